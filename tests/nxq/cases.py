"""Files for the tests of nexusquant.nxq, and a second, lax writer for those that lie."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from nexusquant.nxq import Reader

MAGIC = b"\x89NXQ\r\n\x1a\n"
PREAMBLE = 36
Content = tuple[dict[str, Any], dict[str, list[bytes]], dict[str, dict[str, Any]]]

SMALL: Content = (
    {"codec": "none", "tokens": 3, "scale": 0.5, "model": "Größe 模型", "more": [None, True, {}]},
    {
        "tokens": [b"\1\2\3"],
        "layer.0": [b"page 0", b"", b"page 2"],
        "none": [],
        "tail": [b"z" * 70],
    },
    {"layer.0": {"rate": 1e-05}},
)


def large(chunks: int = 24, size: int = 700) -> Content:
    """About 50 kB of random chunks in three streams."""
    source = random.Random(0)
    streams = {
        f"layer.{i}": [source.randbytes(source.randrange(2 * size)) for _ in range(chunks)]
        for i in range(3)
    }
    return {"codec": "none", "tokens": 256 * chunks}, streams, {}


def contents(reader: Reader) -> Content:
    """Everything a file says."""
    streams = {
        name: [bytes(reader.read(name, i)) for i in range(chunks)]
        for name, chunks in reader.streams.items()
    }
    about = {name: reader.stream_meta(name) for name in streams}
    return reader.meta, streams, {name: meta for name, meta in about.items() if meta}


def header_of(meta: Any, streams: dict[str, int]) -> bytes:
    """A valid header."""
    entries = [{"chunks": count, "name": name} for name, count in streams.items()]
    content = {"meta": meta, "streams": entries}
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def seal(
    header: bytes,
    streams: Sequence[Sequence[bytes]] = (),
    *,
    version: int = 1,
    flags: int = 0,
    header_length: int | None = None,
    count: int | None = None,
    lengths: dict[int, int] | None = None,
    padding: bytes = b"\0",
    tail: bytes = b"",
) -> bytes:
    """A file whose digests are right, whatever the rest is: written from docs/FORMAT.md alone.

    `lengths` replaces those of chunks in the table, `count` and `header_length` the fields of the
    preamble.
    """
    chunks = [chunk for stream in streams for chunk in stream]
    fixed = MAGIC + struct.pack(
        "<HHII",
        version,
        flags,
        len(header) if header_length is None else header_length,
        len(chunks) if count is None else count,
    )
    table = b"".join(
        struct.pack("<I", (lengths or {}).get(i, len(chunk)))
        + blake2b(chunk, digest_size=8).digest()
        for i, chunk in enumerate(chunks)
    )
    digest = blake2b(fixed + header + table, digest_size=16).digest()
    out = bytearray(fixed + digest + header + table)
    for stream in streams:
        if stream:
            out += padding * (-len(out) % 64)
        for chunk in stream:
            out += chunk
    return bytes(out + tail)


def reseal(data: bytes) -> bytes:
    """The same file with its digests made right, as far as its lengths lie within it."""
    if len(data) < PREAMBLE:
        return data
    header, count = struct.unpack_from("<II", data, 12)
    table = PREAMBLE + header
    end = table + 12 * count
    if end > len(data):
        return data
    out = bytearray(data)
    for index, start, stop in spans(data):
        at = table + 12 * index + 4
        out[at : at + 8] = blake2b(out[start:stop], digest_size=8).digest()
    out[20:36] = blake2b(out[:20] + out[36:end], digest_size=16).digest()
    return bytes(out)


def spans(data: bytes) -> list[tuple[int, int, int]]:
    """Index, start and stop of the chunks of a file whose table lies within it."""
    header, count = struct.unpack_from("<II", data, 12)
    table, end = PREAMBLE + header, PREAMBLE + header + 12 * count
    first, at = set(), 0
    try:
        for stream in json.loads(data[PREAMBLE:table])["streams"]:
            first.add(at)
            at += stream["chunks"]
    except (ValueError, LookupError, TypeError, RecursionError):
        first = {0}  # the header is not valid: any guess will do
    found = []
    for index in range(count):
        end += -end % 64 if index in first else 0
        (length,) = struct.unpack_from("<I", data, table + 12 * index)
        found.append((index, end, end + length))
        end += length
    return found
