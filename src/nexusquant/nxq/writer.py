"""Writing .nxq files: the same input gives the same bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

from nexusquant.errors import ConfigError
from nexusquant.nxq import v1
from nexusquant.nxq.atomic import atomic_file
from nexusquant.nxq.head import chunk_digest

Chunk = bytes | bytearray | memoryview
Meta = Mapping[str, Any]


class Writer:
    """Writes chunks as they come, so that one at a time has to be in memory.

    The table precedes the data: the numbers of chunks are said first, room is left for it, and
    `finish` fills it in. A file without `finish` is none that a reader takes.

    Args:
        file: new, seekable, binary.
        meta: the application's part of the header: a JSON object.
        chunks: the streams in order, and how many chunks each will have.
        stream_meta: JSON objects about single streams.

    Raises:
        ConfigError: what is not JSON, names or numbers that the format does not have.
    """

    def __init__(
        self,
        file: BinaryIO,
        meta: Meta,
        chunks: Mapping[str, int],
        stream_meta: Mapping[str, Meta] | None = None,
    ) -> None:
        if isinstance(file, io.TextIOBase) or not hasattr(file, "write"):
            raise ConfigError(f"{type(file).__name__} is no binary file to write into.")
        self._file = file
        self._header = v1.build_header(meta, chunks, {} if stream_meta is None else stream_meta)
        self._owners = [name for name, count in chunks.items() for _ in range(count)]
        self._lengths: list[int] = []
        self._digests: list[bytes] = []
        self._end = file.write(bytes(v1.built_length(self._header, len(self._owners))))

    def add(self, name: str, chunk: Chunk) -> None:
        """Write the next chunk: streams in their order, chunks in theirs."""
        done = len(self._lengths)
        expected = self._owners[done] if done < len(self._owners) else None
        if name != expected:
            raise ConfigError(
                f"a chunk of stream {name!r} where {f'one of {expected!r}' if expected else 'none'}"
                " is next: chunks come in the order, and as many, as was said first."
            )
        data = _flat(chunk)
        if len(data) > v1.MAX_CHUNK:
            raise ConfigError(f"a chunk of {len(data)} bytes, at most {v1.MAX_CHUNK} are allowed.")
        if done == 0 or self._owners[done - 1] != name:
            self._end += self._file.write(bytes(v1.aligned(self._end) - self._end))
        self._file.write(data)
        self._end += len(data)
        self._lengths.append(len(data))
        self._digests.append(chunk_digest(data))

    def finish(self) -> None:
        """Write the head. The file stays open."""
        if missing := len(self._owners) - len(self._lengths):
            raise ConfigError(f"{missing} of {len(self._owners)} chunks were not written.")
        self._file.seek(0)
        self._file.write(v1.build(self._header, self._lengths, self._digests))


def pack(
    meta: Meta,
    streams: Mapping[str, Collection[Chunk]],
    stream_meta: Mapping[str, Meta] | None = None,
) -> bytes:
    """An .nxq file in memory.

    Args:
        meta: the application's part of the header: a JSON object.
        streams: the chunks of every stream.
        stream_meta: JSON objects about single streams.

    Raises:
        ConfigError: something of it is not what the format can hold.

    Example:
        >>> from nexusquant import nxq
        >>> data = nxq.pack({"codec": "x"}, {"tokens": [b"abc"]})
        >>> nxq.Reader.open(data).meta
        {'codec': 'x'}
    """
    file = io.BytesIO()
    _write(file, meta, streams, stream_meta)
    return file.getvalue()


def write_file(
    path: str | os.PathLike[str],
    meta: Meta,
    streams: Mapping[str, Collection[Chunk]],
    stream_meta: Mapping[str, Meta] | None = None,
) -> None:
    """The bytes of `pack` as a file, which appears whole or not at all.

    The chunks of a stream are taken one at a time: a lazy collection need not hold them all.

    Raises:
        ConfigError: something of it is not what the format can hold.
        StoreError: the file cannot be written; one that was there before still is.
    """
    with atomic_file(path) as file:
        _write(file, meta, streams, stream_meta)


def _write(
    file: BinaryIO,
    meta: Meta,
    streams: Mapping[str, Collection[Chunk]],
    stream_meta: Mapping[str, Meta] | None,
) -> None:
    if not isinstance(streams, Mapping):
        raise ConfigError(
            f"streams is a {type(streams).__name__}: give a dictionary of lists of chunks."
        )
    for name, chunks in streams.items():
        if not isinstance(chunks, Collection):
            raise ConfigError(
                f"stream {name!r} is a {type(chunks).__name__}, which does not say how many chunks"
                " it has: give a list, or use Writer."
            )
    counts = {name: len(chunks) for name, chunks in streams.items()}
    writer = Writer(file, meta, counts, stream_meta)
    for name, chunks in streams.items():
        for chunk in chunks:
            writer.add(name, chunk)
    writer.finish()


def _flat(chunk: Chunk) -> memoryview:
    """The bytes of a chunk, whatever their shape."""
    try:
        view = memoryview(chunk)
        return view.cast("B") if view.nbytes else memoryview(b"")  # zeros in a shape cannot be cast
    except TypeError as error:
        raise ConfigError(
            f"a chunk is bytes or a contiguous buffer, not {type(chunk).__name__} ({error})."
        ) from error
