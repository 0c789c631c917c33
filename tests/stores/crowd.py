"""Processes that use one directory store at once and know a wrong value when they read one."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nexusquant.stores.directory import DirectoryStore
from nexusquant.stores.ledger import Ledger, locked

KEYS = 200


def value_of(key: str, length: int, rng: random.Random) -> bytes:
    """A value that says whose it is, how long, and whether all of it is there."""
    head = f"{key:>16}{length:>16}".encode()
    body = head + rng.randbytes(length)
    return hashlib.sha256(body).digest() + body


def is_right(key: str, value: bytes) -> bool:
    """Whether it is a whole value of this key."""
    body = value[32:]
    return (
        hashlib.sha256(body).digest() == value[:32]
        and body[:32] == f"{key:>16}{len(body) - 32:>16}".encode()
    )


class Counting(DirectoryStore):
    """Counts what it evicts and deletes."""

    removed = 0

    def _remove(self, ledger: Ledger, file: Path) -> None:
        self.removed += file.exists()
        super()._remove(ledger, file)


def work(path: Path, limit: int, seed: int, seconds: float, sync: bool) -> Counter[str]:
    """One process: values asked for by a skewed choice, written where missing, and much else."""
    rng, seen, mapped = random.Random(seed), Counter[str](), list[tuple[str, mmap.mmap]]()
    store = Counting(path, limit, sync=sync)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        key = f"key-{int(KEYS * rng.random() ** 2)}"
        what = rng.random()
        if what < 0.6:
            value = store.get(key)
            seen["hits" if value is not None else "misses"] += 1
            seen["wrong"] += value is not None and not is_right(key, value)
            if value is None:
                what = 0.9
        elif what < 0.7:
            head = store.get_range(key, 32, 48)
            seen["ranges"] += 1
            seen["wrong"] += head is not None and head != f"{key:>16}".encode()
        elif what < 0.75:
            view = store.open_mmap(key)
            if view is not None:
                seen["maps"] += 1
                mapped.append((key, view))
        elif what < 0.8:
            store.contains_many([key, "key-0", "none"])
        elif what < 0.82:
            before = store.removed
            store.delete(key)
            seen["deletes"] += store.removed - before
        if what >= 0.82:
            store.put(key, value_of(key, rng.randrange(limit // 50), rng))
            seen["puts"] += 1
        if len(mapped) > 5:  # most of them evicted or replaced by now
            key, view = mapped.pop(0)
            seen["wrong"] += not is_right(key, view[:])
            view.close()
    for _, view in mapped:
        view.close()
    seen["evictions"] = store.removed - seen["deletes"]
    return seen


class Observer(threading.Thread):
    """Looks again and again how much there is, with eyes of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.looks = self.most = self.most_temporary = self.overcount = 0
        self._path, self._done = path, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _look(self) -> None:
        own = self._path / ".nexusquant"
        if not own.exists():  # nobody has written yet
            return
        with locked(own / "ledger") as ledger:  # between two changes, as any single moment is
            there = _bytes_in(self._path)
            if ledger.total is not None:  # the first writer has counted
                self.overcount = max(self.overcount, abs(ledger.total - there))
        self.most = max(self.most, there)
        self.most_temporary = max(self.most_temporary, _bytes_in(own))
        self.looks += 1


def _bytes_in(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(_size(entry) for entry in entries)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except FileNotFoundError:  # a temporary file, published meanwhile
        return 0


def crowd(
    path: Path, limit: int, processes: int, seconds: float, sync: bool
) -> tuple[Counter[str], Observer]:
    """All of them, watched."""
    DirectoryStore(path, limit)  # something to watch at once, where there is a folder
    observer = Observer(path)
    observer.start()
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [
                pool.submit(work, path, limit, seed, seconds, sync) for seed in range(processes)
            ]
            return sum((job.result() for job in jobs), Counter[str]()), observer
    finally:
        observer.stop()
