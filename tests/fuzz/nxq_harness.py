"""What fuzzing does to .nxq files, and what must be true of reading them; see README.md."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from nexusquant import nxq
from nexusquant.errors import FormatError
from tests.nxq.cases import PREAMBLE, Content, contents, reseal, seal, spans

A = TypeVar("A")
B = TypeVar("B")
Decoder = Callable[[nxq.Reader], object]
DECODERS: list[Decoder] = []
"""Called with every file that opens: may raise FormatError and nothing else."""

Mutate = Callable[[bytes, int], bytes]
_VALUES = (None, True, -1, 0, 1, 2, 255, 2**22, 2**53 - 1, 0.5, "", "s", [], {}, {"a": 1})


def check(data: bytes) -> bool:
    """Read a file in every way; True if it was taken, and then it is what the writer writes."""
    reader = _unless_refused(nxq.Reader.open, data)
    if reader is None:
        return False
    for decode in DECODERS:
        _unless_refused(decode, reader)
    found = _unless_refused(_verified, reader)
    assert found is None or nxq.pack(*found) == data
    return found is not None


def mutate(data: bytes, size: int, seed: int, bytewise: Mutate) -> bytes:
    """A file of at most `size` bytes like this one, most often with digests that are right.

    Args:
        bytewise: changes bytes, to at most so many.
    """
    source = random.Random(seed)
    try:
        header, chunks = _parts(data)
    except (ValueError, LookupError, TypeError, RecursionError, struct.error):
        return reseal(bytewise(data, size))  # no file as it stands
    counts = [len(stream) for stream in chunks]
    kind = source.choice(("file", "fields", "text", "tree", "chunk", "chunk", "chunk", "list"))
    if kind == "file":
        return bytewise(data, size)
    if kind == "fields":
        return reseal(bytewise(data, size))
    if kind == "text":
        header = bytewise(header, 2 * len(header))
    elif kind == "tree":
        header = _edit(header, source)
    elif kind == "chunk" and any(counts):
        stream = source.choice([stream for stream in chunks if stream])
        at = source.randrange(len(stream))
        stream[at] = bytewise(stream[at] or b"\0", 2 * len(stream[at]) + 16)
    elif chunks:
        stream = source.choice(chunks)
        if stream and source.random() < 0.5:
            del stream[source.randrange(len(stream))]
        else:
            stream.append(source.randbytes(source.randrange(64)))
        if source.random() < 0.9:  # so that the header agrees
            header = _counted(header, chunks)
    out = seal(header, chunks)
    return out if len(out) <= size else data[:size]


def _unless_refused(read: Callable[[A], B], given: A) -> B | None:
    try:
        return read(given)
    except FormatError:
        return None


def _verified(reader: nxq.Reader) -> Content:
    reader.verify()
    return contents(reader)


def _parts(data: bytes) -> tuple[bytes, list[list[bytes]]]:
    """The header and the chunks of every stream."""
    length = int.from_bytes(data[12:16], "little")
    header = data[PREAMBLE : PREAMBLE + length]
    pieces = [data[start:stop] for _, start, stop in spans(data)]
    chunks, at = [], 0
    for stream in json.loads(header)["streams"]:
        chunks.append(pieces[at : at + stream["chunks"]])
        at += stream["chunks"]
    return header, chunks


def _dump(content: Any) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")


def _counted(header: bytes, chunks: list[list[bytes]]) -> bytes:
    content = json.loads(header)
    for stream, found in zip(content["streams"], chunks, strict=True):
        stream["chunks"] = len(found)
    return _dump(content)


def _edit(header: bytes, source: random.Random) -> bytes:
    """One place of the JSON replaced, removed or doubled."""
    content = json.loads(header)
    places: list[tuple[Any, Any]] = []
    todo = [content]
    for node in todo:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    node, key = source.choice(places)
    kind = source.random()
    if kind < 0.6:
        node[key] = source.choice(_VALUES)
    elif kind < 0.8:
        del node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[source.choice(("a", "name", "meta", "x" * 70))] = node[key]
    return _dump(content)
