"""Reading .nxq files chunk by chunk, and nothing of them but what is asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nexusquant.errors import ConfigError, FormatError, NexusQuantError, StoreError
from nexusquant.nxq import v1
from nexusquant.nxq.head import Head, Layout, Stream, version_of
from nexusquant.nxq.sources import Memory, Source, name_of, source_of

LAYOUTS: dict[int, Layout] = {1: v1.LAYOUT}
FIRST_READ = 1 << 16  # holds most heads


class Reader:
    """An open .nxq file.

    Attributes:
        version: of the format.
        meta: the application's part of the header.
        nbytes: of the file.
        streams: the number of chunks of every stream, in the order of the file.
        digest: of the head, which holds the digests of all chunks.

    Example:
        >>> from nexusquant import nxq
        >>> with nxq.Reader.open(nxq.pack({"codec": "x"}, {"layer.0": [b"ab", b"c"]})) as reader:
        ...     reader.streams, bytes(reader.read("layer.0", 1))
        ({'layer.0': 2}, b'c')
    """

    def __init__(self, source: Source, name: str) -> None:
        """Use `open`."""
        self._source: Source | None = source
        self._name = name
        with self._errors("its size"):
            size = source.size()
        self._head = head = self._read_head(size)
        self.version = head.version
        self.meta = head.meta
        self.nbytes = head.size
        self.streams = {name: stream.chunks for name, stream in head.streams.items()}
        self.digest = head.digest

    @staticmethod
    def open(source: Any, name: str | None = None) -> Reader:
        """Read and check a file's head: in one read, or two if it is longer than FIRST_READ.

        Args:
            source: a path (which is mapped), bytes, memoryview or mmap, a seekable binary file, or
                any `Source`.
            name: what messages call it; default: its path or type.

        Raises:
            FormatError: not an .nxq file, damaged, cut short or of an unknown version.
            StoreError: it cannot be read.
        """
        opened = source_of(source)
        try:
            return Reader(opened, name_of(source) if name is None else name)
        except BaseException:
            _close(opened)
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the mapping of a path. Chunks that were read stay valid; files and sources open."""
        if self._source is not None:
            _close(self._source)
            self._source = None

    def stream_meta(self, name: str) -> dict[str, Any]:
        """What the header says about a stream."""
        return self._stream(name).meta

    def size(self, name: str) -> int:
        """Bytes of a stream, all chunks together."""
        stream = self._stream(name)
        return sum(self._head.lengths[stream.first : stream.first + stream.chunks])

    def read(self, name: str, chunk: int) -> memoryview:
        """One chunk, read-only, its digest checked.

        Raises:
            FormatError: it is damaged, or there is no such stream or chunk.
            StoreError: it cannot be read.
        """
        chunk = _number("chunk", chunk)
        return self.read_range(name, chunk, chunk + 1)[0]

    def read_range(self, name: str, start: int, stop: int) -> list[memoryview]:
        """The chunks from `start` up to `stop`, like `read`, in one read of the source."""
        stream, head = self._stream(name), self._head
        start, stop = _number("start", start), _number("stop", stop)
        if not 0 <= start <= stop <= stream.chunks:
            raise FormatError(
                f"{self._name}: stream {name!r} has {stream.chunks} chunks, so none from {start} up"
                f" to {stop}."
            )
        if start == stop:
            return []
        first, last = stream.first + start, stream.first + stop - 1
        base = head.starts[first]
        data = self._fetch(base, head.starts[last] + head.lengths[last])
        chunks = []
        for index in range(first, last + 1):
            at = head.starts[index] - base
            chunks.append(data[at : at + head.lengths[index]])
            if not head.matches(index, chunks[-1]):
                raise FormatError(
                    f"{self._name}: chunk {index - stream.first} of stream {name!r} is damaged"
                    " (wrong digest). Make or copy the file again."
                )
        return chunks

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every byte of the file.

        Args:
            progress: called after every chunk with the bytes checked and the bytes in all.

        Raises:
            FormatError: the first thing that is wrong.
            StoreError: it cannot be read.
        """
        head = self._head
        end = head.length
        for name, stream in head.streams.items():
            for chunk in range(stream.chunks):
                start = head.starts[stream.first + chunk]
                if any(self._fetch(end, start)):
                    raise FormatError(
                        f"{self._name}: damaged, bytes {end} to {start - 1} should be zero. Make or"
                        " copy the file again."
                    )
                end = start + len(self.read(name, chunk))
                if progress is not None:
                    progress(end, head.size)

    def _read_head(self, size: int) -> Head:
        raw = self._fetch(0, min(size, FIRST_READ))
        version = version_of(raw, self._name)
        if version not in LAYOUTS:
            raise FormatError(
                f"{self._name}: version {version} of the format, this nexusquant reads"
                f" {', '.join(map(str, LAYOUTS))}. Upgrade nexusquant, or make the file again."
            )
        layout = LAYOUTS[version]
        length = layout.length(raw, size, self._name)
        if length > len(raw):
            raw = memoryview(b"".join([raw, self._fetch(len(raw), length)]))
        return layout.parse(raw[:length], size, self._name)

    def _fetch(self, start: int, stop: int) -> memoryview:
        """A range of the file, all of it."""
        if self._source is None:
            raise ConfigError(f"{self._name}: this reader was closed, open another one.")
        if start == stop:
            return memoryview(b"")  # without asking a store for nothing
        with self._errors(f"bytes {start} to {stop - 1}"):
            given = self._source.read(start, stop)
        try:
            data = memoryview(given).toreadonly().cast("B")
        except TypeError as error:  # of a file in text mode, say
            raise ConfigError(
                f"{self._name}: reading gives {type(given).__name__}, which is no contiguous bytes:"
                " open a file in binary mode."
            ) from error
        if len(data) != stop - start:
            raise FormatError(
                f"{self._name}: {len(data)} bytes came for the {stop - start} from byte {start} on."
                " It has changed since it was opened: open it again."
            )
        return data

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except NexusQuantError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a file that was closed
            raise StoreError(f"{self._name}: {what} cannot be read ({error}).") from error

    def _stream(self, name: str) -> Stream:
        if not isinstance(name, str) or name not in self._head.streams:
            raise FormatError(
                f"{self._name}: no stream {name!r}, there are {', '.join(self.streams) or 'none'}."
            )
        return self._head.streams[name]


def _number(name: str, value: int) -> int:
    """An index, of NumPy for example; not a `1.0`."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name}={value!r}: must be an integer.") from error


def _close(source: Source) -> None:
    if isinstance(source, Memory):
        source.close()
