"""The file that a directory store's writers lock, and that says how many bytes its values take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexusquant.errors import StoreError

if sys.platform != "win32":
    import fcntl

TIMEOUT = 60.0  # seconds; a writer holds the lock for microseconds, or while it lists the directory


class Ledger:
    """The locked file: 20 digits, the bytes of all values, never less than there are."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, 64, 0)
        #: None until somebody has counted.
        self.total = int(text) if len(text) == 21 and text[:20].isdigit() else None

    def set(self, total: int) -> None:
        """Write the total down."""
        self.total = max(0, total)
        os.pwrite(self._descriptor, b"%020d\n" % self.total, 0)

    def add(self, count: int) -> None:
        """Write down `count` bytes more, before they are there, or less, after they are gone."""
        self.set((self.total or 0) + count)


@contextmanager
def locked(file: Path) -> Iterator[Ledger]:
    """The ledger, for one thread of one process at a time.

    Raises:
        StoreError: another one has held it for a minute.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _wait(descriptor, file)
        try:
            yield Ledger(descriptor)
        finally:  # closing is not enough if a fork has the file open, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file, unless somebody else has; closing the file unlocks it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_if_dead(file: Path) -> None:
    """Remove a file, unless its writer lives and has it locked."""
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        if try_lock(descriptor):
            file.unlink()
    finally:
        os.close(descriptor)


def _wait(descriptor: int, file: Path) -> None:
    end, pause = time.monotonic() + TIMEOUT, 0.0002
    while not try_lock(descriptor):
        if time.monotonic() > end:
            raise StoreError(
                f"{file}: locked by another process for {TIMEOUT:.0f} s, which may hang. End it;"
                " the lock goes with it."
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
