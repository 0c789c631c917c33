"""What precedes the data of an .nxq file: its fields, and which module reads which version."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from nexusquant.errors import FormatError

MAGIC = b"\x89NXQ\r\n\x1a\n"
VERSION = 1  # what is written
COMMON = 12  # bytes that every version starts with: magic, u16 version, u16 flags
DIGEST = 8  # bytes of a chunk's digest


@dataclass(frozen=True)
class Stream:
    """A named run of chunks."""

    first: int  # of its chunks, among all chunks of the file
    chunks: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Head:
    """Everything that is known of a file before its data is read."""

    version: int
    meta: dict[str, Any]
    streams: dict[str, Stream]
    starts: array[int]  # of every chunk, from the start of the file
    lengths: array[int]
    digests: bytes  # DIGEST bytes for every chunk
    length: int  # of the head itself
    size: int  # of the file
    digest: bytes  # of the head, and so of everything but padding

    def matches(self, chunk: int, data: memoryview) -> bool:
        """Is this the data of a chunk?"""
        return chunk_digest(data) == self.digests[DIGEST * chunk : DIGEST * (chunk + 1)]


@dataclass(frozen=True)
class Layout:
    """How one version of the format is read.

    `length(first, size, label)`: bytes of the head, from at least its preamble, checked against the
    size of the file. `parse(raw, size, label)`: the head from exactly these bytes.
    """

    length: Callable[[memoryview, int, str], int]
    parse: Callable[[memoryview, int, str], Head]


def chunk_digest(data: memoryview) -> bytes:
    return blake2b(data, digest_size=DIGEST).digest()


def version_of(first: memoryview, label: str) -> int:
    """The version of a file that starts with these bytes; FormatError if it is none of ours."""
    magic = bytes(first[: len(MAGIC)])
    if not magic:
        raise FormatError(f"{label}: empty. Make or copy it again.")
    if magic != MAGIC:
        if magic[:4] == MAGIC[:4]:
            raise FormatError(
                f"{label}: line ends were changed, as a copy in text mode does. Copy the original"
                " again, in binary mode."
            )
        raise FormatError(f"{label}: not an .nxq file, which would start with {MAGIC!r}.")
    if len(first) < COMMON:
        raise FormatError(f"{label}: ends after {len(first)} bytes, within the preamble.")
    return int.from_bytes(first[8:10], "little")
