"""Version 1 of the .nxq format: how its head is read and written, byte for byte."""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from nexusquant.errors import ConfigError, FormatError
from nexusquant.nxq import canonical
from nexusquant.nxq.head import DIGEST, MAGIC, Head, Layout, Stream

ALIGNMENT = 64  # of a stream's first chunk
MAX_HEADER = 1 << 20
MAX_CHUNKS = 1 << 22
MAX_CHUNK = (1 << 32) - 1
_FIXED = struct.Struct("<8sHHII")  # magic, version, flags, bytes of header, chunks
_ENTRY = struct.Struct(f"<I{DIGEST}s")  # bytes of a chunk, its digest
_HEAD_DIGEST = 16
PREAMBLE = _FIXED.size + _HEAD_DIGEST
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REMEDY = "Make or copy it again."


def aligned(offset: int) -> int:
    """The next offset at which a stream may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def head_length(first: memoryview, size: int, label: str) -> int:
    """Bytes of the head of a file of `size` bytes, from its preamble."""
    if len(first) < PREAMBLE:
        raise FormatError(f"{label}: ends after {len(first)} bytes, within the preamble. {_REMEDY}")
    _, _, flags, header, chunks = _FIXED.unpack_from(first)
    if flags:
        raise FormatError(
            f"{label}: sets flags {flags:#06x}, which this version of nexusquant does not know."
            " Upgrade nexusquant, or make the file again."
        )
    if header > MAX_HEADER or chunks > MAX_CHUNKS:
        raise FormatError(
            f"{label}: the preamble is damaged, it promises a header of {header} bytes (at most"
            f" {MAX_HEADER}) and {chunks} chunks (at most {MAX_CHUNKS}). {_REMEDY}"
        )
    length = PREAMBLE + header + _ENTRY.size * chunks
    if length > size:
        raise FormatError(
            f"{label}: cut short, {size} bytes where header and table alone are {length}. {_REMEDY}"
        )
    return int(length)


def parse(raw: memoryview, size: int, label: str) -> Head:
    """The head of a file of `size` bytes, from the head's bytes."""
    _, version, _, header, chunks = _FIXED.unpack_from(raw)
    if raw[_FIXED.size : PREAMBLE] != (digest := _digest(raw)):
        raise FormatError(f"{label}: header or table is damaged (wrong digest). {_REMEDY}")
    try:
        content = canonical.decode(bytes(raw[PREAMBLE : PREAMBLE + header]))
        streams = _streams(content)
    except ValueError as error:
        raise FormatError(f"{label}: the header is not valid: {error}. {_REMEDY}") from error
    if (named := sum(stream.chunks for stream in streams.values())) != chunks:
        raise FormatError(
            f"{label}: the header's streams have {named} chunks, the table has {chunks}. {_REMEDY}"
        )
    starts, lengths, digests = array("Q"), array("Q"), bytearray()
    first = {stream.first for stream in streams.values()}
    end = len(raw)
    for index, (length, chunk) in enumerate(_ENTRY.iter_unpack(raw[PREAMBLE + header :])):
        end = aligned(end) if index in first else end
        starts.append(end)
        lengths.append(length)
        digests += chunk
        end += length
    if end != size:
        raise FormatError(f"{label}: {size} bytes, but its table makes it {end}. {_REMEDY}")
    return Head(
        version, content["meta"], streams, starts, lengths, bytes(digests), len(raw), size, digest
    )


def build_header(
    meta: Mapping[str, Any], chunks: Mapping[str, int], stream_meta: Mapping[str, Any]
) -> bytes:
    """The JSON of a header; ConfigError for what a reader would refuse."""
    if not isinstance(chunks, Mapping):
        raise ConfigError(f"chunks={chunks!r:.80}: must be a dictionary of streams' numbers.")
    single = stream_meta.values() if isinstance(stream_meta, Mapping) else ()
    if not all(isinstance(about, Mapping) for about in (meta, stream_meta, *single)):
        raise ConfigError("meta and stream_meta are dictionaries, also for single streams.")
    if unknown := set(stream_meta) - set(chunks):
        raise ConfigError(f"stream_meta is about streams that are not there: {unknown}.")
    streams = [
        {"name": name, "chunks": count} | ({"meta": dict(about)} if about else {})
        for name, count in chunks.items()
        for about in [stream_meta.get(name)]
    ]
    content = {"meta": dict(meta), "streams": streams}
    try:
        raw = canonical.encode(content)
        _streams(content)
    except ValueError as error:
        raise ConfigError(f"this cannot be an .nxq header: {error}.") from error
    if len(raw) > MAX_HEADER:
        raise ConfigError(
            f"a header of {len(raw)} bytes, at most {MAX_HEADER} are allowed: data goes into"
            " streams."
        )
    if (total := sum(chunks.values())) > MAX_CHUNKS:
        raise ConfigError(f"{total} chunks, at most {MAX_CHUNKS} are allowed: make them larger.")
    return raw


def build(header: bytes, lengths: list[int], digests: list[bytes]) -> bytes:
    """A head from a header's JSON and the table's columns."""
    fixed = _FIXED.pack(MAGIC, 1, 0, len(header), len(lengths))
    table = b"".join(map(_ENTRY.pack, lengths, digests))
    raw = b"".join([fixed, bytes(_HEAD_DIGEST), header, table])
    return b"".join([fixed, _digest(memoryview(raw)), header, table])


def built_length(header: bytes, chunks: int) -> int:
    """Bytes that `build` will give."""
    return PREAMBLE + len(header) + _ENTRY.size * chunks


def _digest(raw: memoryview) -> bytes:
    """Of everything in the head but the digest itself."""
    digest = blake2b(raw[: _FIXED.size], digest_size=_HEAD_DIGEST)
    digest.update(raw[PREAMBLE:])
    return digest.digest()


def _streams(content: Any) -> dict[str, Stream]:
    """The streams of a header, in order; ValueError if it is not of this form."""
    if not isinstance(content, dict) or set(content) != {"meta", "streams"}:
        raise ValueError("not an object with `meta` and `streams`")
    if not isinstance(content["meta"], dict) or not isinstance(content["streams"], list):
        raise ValueError("`meta` is not an object, or `streams` not an array")
    streams: dict[str, Stream] = {}
    first = 0
    for entry in content["streams"]:
        if not isinstance(entry, dict) or not {"name", "chunks"} <= set(entry) <= _KEYS:
            raise ValueError("a stream is not an object with `name`, `chunks` and perhaps `meta`")
        name, chunks, meta = entry["name"], entry["chunks"], entry.get("meta", {})
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no name of a stream ({_NAME.pattern})")
        if name in streams:
            raise ValueError(f"two streams are called {name!r}")
        if type(chunks) is not int or not 0 <= chunks <= MAX_CHUNKS:
            raise ValueError(f"stream {name!r} has {chunks!r:.80} chunks")
        if not isinstance(meta, dict) or ("meta" in entry and not meta):
            raise ValueError(f"`meta` of stream {name!r} is not an object, or empty")
        streams[name] = Stream(first, chunks, meta)
        first += chunks
    return streams


_KEYS = {"name", "chunks", "meta"}
LAYOUT = Layout(head_length, parse)
