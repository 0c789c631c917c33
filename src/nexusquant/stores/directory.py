"""A directory of files as a store, for all processes that can see it.

Not diskcache, whose limit may be exceeded and whose every read writes to SQLite, and no lock
library, as `flock` is all of it and has to hold for files that are being written, too.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import mmap
import os
import stat
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores.base import Store, is_key, need
from nexusquant.stores.ledger import Ledger, locked, remove_if_dead, try_lock

_OWN = ".nexusquant"  # no key begins with a dot
_PART = "part-"
_CANDIDATES = 1024  # evictions per listing of the directory


class _Value(NamedTuple):
    """Sorted by when it was last used."""

    used: int  # nanoseconds, the file's mtime
    name: str
    size: int


class DirectoryStore(Store):
    """One file per value, `KEY.HASH`, whose time of modification is when it was last used.

    A value is written to a temporary file and renamed, so a reader needs no lock: it has the old
    file open or the new one, and an evicted one stays whole until it is closed or unmapped.

    `max_bytes` bounds the bytes of all values at any moment, however many processes write, if all
    of them give it: room is made and counted under a lock before a value appears. To it comes one
    temporary file for each `put` under way. The least recently used values go first, as exactly as
    the processes' clocks agree. What else is in the directory is left alone and not counted.

    Temporary files of killed writers are removed by the next process that writes, and whenever
    the directory is listed for evictions; a writer that lives has a lock on its own.

    The file system must be POSIX with `flock`, for writers only: a store that is only read may be
    mounted read-only.

    Args:
        path: made by the first `put` if missing; until then, nothing is there.
        max_bytes: None for no limit. A directory that holds more is brought down to it.
        sync: whether `put` waits until the bytes are on the disk. Without, a power cut can leave
            damaged values; with it, it can only lose the last ones. Killed processes do no harm.
    """

    def __init__(
        self, path: str | Path, max_bytes: int | None = None, *, sync: bool = True
    ) -> None:
        if sys.platform == "win32":
            raise StoreError(f"{path}: directory stores need POSIX. Use Redis or fsspec.")
        limit = max_bytes is None or (type(max_bytes) is int and max_bytes >= 1)
        need(limit, "max_bytes", max_bytes, "an integer of at least 1, or None for no limit")
        need(isinstance(sync, bool), "sync", sync, "True or False")
        need(path != "" and "\0" not in str(path), "path", path, "that of a directory")
        try:
            self.path = Path(path).expanduser().absolute()
        except (RuntimeError, TypeError) as error:  # no such user; not a path
            raise ConfigError(f"{path!r} is not a path ({error}).") from error
        self.where = str(self.path)
        self.max_bytes = max_bytes
        self._sync = sync
        self._own = self.path / _OWN
        self._counted = False
        self._oldest: deque[_Value] = deque()  # of the last listing, those not yet looked at
        with self._errors("cannot open the store"):
            if self._exists() and max_bytes is not None:
                with self._writing() as ledger:
                    self._make_room(ledger, 0)

    def path_of(self, key: str) -> Path:
        """The file of a value, there or not. Do not write to it."""
        return self.path / _name(self._checked(key))

    def open_mmap(self, key: str) -> mmap.mmap | None:
        """The value in memory as it is read, None if there is none. Close it.

        Raises:
            StoreError: the value is empty, which cannot be mapped.
        """
        self._checked(key)
        with self._errors(f"cannot map {key}"):
            file = self._open(key)
            if file is None:
                return None
            with file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise StoreError(f"{self.where}: {key} is empty and cannot be mapped. Get it.")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def nbytes(self) -> int:
        """Bytes of all values; more for a while if a writer was killed."""
        self._check_open()
        with self._errors("cannot count"):
            if not self._exists():
                return 0
            with self._writing() as ledger:
                return ledger.total or 0

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        with self._errors(f"cannot read {key}"):
            try:
                file = self._open(key)
                if file is None:
                    return None
                with file:
                    size = os.fstat(file.fileno()).st_size
                    start = file.seek(min(start, size))
                    return file.read(size - start if stop is None else min(stop, size) - start)
            except OSError as error:
                if error.errno == errno.ESTALE:  # NFS: evicted by another machine
                    return None
                raise

    def _size(self, key: str) -> int | None:
        with self._errors(f"cannot look for {key}"):
            try:
                return (self.path / _name(key)).stat().st_size
            except FileNotFoundError:
                return None

    def _put(self, key: str, data: memoryview) -> None:
        if self.max_bytes is not None and len(data) > self.max_bytes:
            raise StoreError(
                f"{self.where}: {key} has {len(data)} bytes, the store may take {self.max_bytes}."
                " Raise max_bytes."
            )
        with self._errors(f"cannot write {key} ({len(data)} bytes)"):
            with self._writing():  # or a listing could take the file for a dead writer's
                part = self._own / f"{_PART}{uuid.uuid4().hex}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(part, flags, 0o666)
                try_lock(descriptor)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                if self._sync:
                    os.fsync(descriptor)
                with self._writing() as ledger:
                    self._publish(ledger, part, descriptor, self.path / _name(key))
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def _publish(self, ledger: Ledger, part: Path, descriptor: int, target: Path) -> None:
        """Make room and let the value appear, counted before it does."""
        new, old = os.fstat(descriptor).st_size, 0
        with suppress(FileNotFoundError):
            old = target.stat().st_size
        self._make_room(ledger, new - old, target.name)
        ledger.add(new)
        _use(descriptor)
        part.replace(target)
        ledger.add(-old)

    def _delete(self, key: str) -> None:
        if self._size(key) is None:
            return
        if self._size(key) is None:  # do not make the directory for that
            return
        with self._errors(f"cannot delete {key}"), self._writing() as ledger:
            self._remove(ledger, self.path / _name(key))

    def _keys(self) -> Iterator[str]:
        with self._errors("cannot list the values"):
            try:
                return iter([_key(value.name) for value in self._values()])
            except FileNotFoundError:
                return iter(())

    def _exists(self) -> bool:
        """Whether the directory was made."""
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(self.path))
        return True

    def _open(self, key: str) -> BufferedReader | None:
        try:
            file = (self.path / _name(key)).open("rb")
        except FileNotFoundError:
            return None
        with suppress(OSError):  # another user's file, or a read-only disk: read all the same
            _use(file.fileno())
        return file

    @contextmanager
    def _writing(self) -> Iterator[Ledger]:
        """Nobody else changes the directory; `ledger.total` is at least what is there."""
        self._own.mkdir(parents=True, exist_ok=True)
        with locked(self._own / "ledger") as ledger:
            if ledger.total is None or not self._counted:
                self._count(ledger)
            yield ledger

    def _count(self, ledger: Ledger, but: str = "") -> None:
        """List the directory: what it holds, what to evict first, what dead writers left."""
        for part in self._own.glob(f"{_PART}*"):
            with suppress(FileNotFoundError, PermissionError):  # gone; another user's
                remove_if_dead(part)
        values = list(self._values())
        ledger.set(sum(value.size for value in values))
        candidates = (value for value in values if value.name != but)
        self._oldest = deque(heapq.nsmallest(_CANDIDATES, candidates))
        self._counted = True

    def _values(self) -> Iterator[_Value]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                key = _key(entry.name)
                if is_key(key) and entry.name == _name(key):
                    with suppress(FileNotFoundError):  # somebody removed it by hand
                        if entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            yield _Value(status.st_mtime_ns, entry.name, status.st_size)

    def _make_room(self, ledger: Ledger, count: int, but: str = "") -> None:
        """Evict until there is room for `count` bytes more, but not the file `but`.

        The oldest values of an earlier listing are still the oldest, in the same order, if their
        times have not changed: whatever was used or written since is newer than all of them.
        """
        listed = False
        while self.max_bytes is not None and (ledger.total or 0) + count > self.max_bytes:
            if not self._oldest:
                self._count(ledger, but)
                listed = True
                if not self._oldest and (ledger.total or 0) + count > self.max_bytes:
                    raise StoreError(
                        f"{self.where}: nothing left to evict, something else writes into the"
                        " directory. Leave that to stores."
                    )
                continue
            value = self._oldest.popleft()
            file = self.path / value.name
            with suppress(FileNotFoundError):
                used = listed or file.stat().st_mtime_ns == value.used
                if value.name != but and used:
                    self._remove(ledger, file)

    def _remove(self, ledger: Ledger, file: Path) -> None:
        with suppress(FileNotFoundError):
            size = file.stat().st_size
            file.unlink()
            ledger.add(-size)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "Free some space or lower max_bytes" if full else "Check path and permissions"
            raise StoreError(f"{self.where}: {what} ({error}). {advice}.") from error


def _name(key: str) -> str:
    """Of a key's file: the hash tells it from foreign files, and `A` from `a` on macOS."""
    return f"{key}.{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def _key(name: str) -> str:
    return name.rpartition(".")[0]


def _use(descriptor: int) -> None:
    """Note that a value is used now. The kernel's own clock ticks in milliseconds."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
