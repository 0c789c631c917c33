"""Where the bytes of an .nxq file come from: memory, a mapped or open file, a store."""

from __future__ import annotations

import io
import mmap
import os
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol, runtime_checkable

from nexusquant.errors import ConfigError, StoreError


@runtime_checkable
class Source(Protocol):
    """Bytes that are read by range, of a key in a store for example."""

    def size(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Those from `start` up to, not including, `stop`."""
        ...


class Memory:
    """Bytes in memory; what is read from them is a view."""

    def __init__(self, data: bytes | bytearray | memoryview | mmap.mmap) -> None:
        self._view = memoryview(data).cast("B")

    def size(self) -> int:
        return len(self._view)

    def read(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]

    def close(self) -> None:
        self._view.release()


class MappedFile(Memory):
    """A file mapped into memory: what is read from it is a view, and nothing else is touched."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
                data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise StoreError(f"{path}: cannot be opened ({error}).") from error
        self._data = data
        super().__init__(data)

    def close(self) -> None:
        super().close()
        if isinstance(self._data, mmap.mmap):
            with suppress(BufferError):  # views that were read keep the mapping, and end it
                self._data.close()


class OpenFile:
    """An open binary file; reading moves its position."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = Lock()

    def size(self) -> int:
        with self._lock:
            return self._file.seek(0, os.SEEK_END)

    def read(self, start: int, stop: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            parts = []
            while start < stop and (part := self._file.read(stop - start)):
                parts.append(part)
                start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def source_of(given: Any) -> Source:
    """A source of anything that `Reader.open` takes."""
    if isinstance(given, (str, os.PathLike)):
        return MappedFile(Path(given))
    if isinstance(given, (bytes, bytearray, memoryview, mmap.mmap)):
        try:
            return Memory(given)
        except (TypeError, ValueError) as error:  # with steps in it; released, or closed
            raise ConfigError(
                f"this {type(given).__name__} cannot be read ({error}): give contiguous bytes."
            ) from error
    if isinstance(given, Source):
        return given
    if hasattr(given, "seek") and hasattr(given, "read") and not isinstance(given, io.TextIOBase):
        return OpenFile(given)
    raise ConfigError(
        f"{type(given).__name__} is nothing to read an .nxq file from: give a path, bytes, a binary"
        " file, or an object with size() and read(start, stop)."
    )


def name_of(given: Any) -> str:
    """What messages call it."""
    if isinstance(given, (str, os.PathLike)):
        return str(given)
    name = getattr(given, "name", None)
    return name if isinstance(name, str) else f"<{type(given).__name__}>"
