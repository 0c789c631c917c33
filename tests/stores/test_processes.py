"""Many processes on one directory: no wrong read, no byte too many, nothing left by the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nexusquant.errors import StoreError
from nexusquant.stores.directory import DirectoryStore
from nexusquant.stores.ledger import locked
from tests.stores.crowd import crowd, is_right

LIMIT = 4_000_000


@pytest.mark.parametrize(
    ("processes", "seconds", "sync"),
    [(4, 3, False), pytest.param(10, 60, True, marks=pytest.mark.slow)],
)
def test_a_crowd_reads_nothing_wrong_and_keeps_the_limit(
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    processes: int,
    seconds: float,
    sync: bool,
) -> None:
    seen, observer = crowd(tmp_path, LIMIT, processes, seconds, sync)
    record_property("seen", dict(seen))
    record_property("most bytes", (observer.most, observer.most_temporary, LIMIT, observer.looks))
    assert seen["wrong"] == 0
    assert min(seen[x] for x in ("hits", "misses", "puts", "ranges", "maps", "evictions")) > 50
    assert observer.looks > 50 * seconds / processes
    assert observer.most <= LIMIT
    assert observer.most > 0.9 * LIMIT
    assert observer.overcount == 0  # nobody was killed
    assert observer.most_temporary <= processes * (LIMIT // 50 + 64) + 21
    store = DirectoryStore(tmp_path, LIMIT)
    assert {key for key in list(store.keys()) if not is_right(key, store.get(key) or b"")} == set()
    assert sorted(x.name for x in (tmp_path / ".nexusquant").iterdir()) == ["ledger"]


def test_ten_that_begin_at_once_where_nothing_is_yet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store"
    seen, observer = crowd(path, LIMIT, 10, 1, False)
    assert seen["wrong"] == 0
    assert min(seen[x] for x in ("hits", "puts", "evictions")) > 50
    assert 0.9 * LIMIT < observer.most <= LIMIT
    assert observer.overcount == 0
    assert DirectoryStore(path).nbytes() == sum(_visible(path).values())
    assert sorted(x.name for x in (path / ".nexusquant").iterdir()) == ["ledger"]


_WRITER = """
import os, signal, sys
from pathlib import Path
from nexusquant.stores.directory import DirectoryStore

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

write, replace, where = os.write, Path.replace, sys.argv[2]
store = DirectoryStore(sys.argv[1], 1_000_000)
if where == "write":
    os.write = lambda descriptor, data: die(write(descriptor, data[: len(data) // 2]))
elif where == "fsync":
    os.fsync = die
elif where == "rename":
    Path.replace = die
elif where == "renamed":
    Path.replace = lambda *names: die(replace(*names))
count = 0
while True:
    store.put(f"key-{count % 7}", bytes([count % 251]) * 200_000)
    count += 1
    if count == 3:
        print("busy", flush=True)
"""


def _writer(path: Path, where: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _WRITER, str(path), where]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def _visible(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "renamed"])
def test_a_writer_killed_at_any_step_leaves_nothing_half_done(tmp_path: Path, where: str) -> None:
    DirectoryStore(tmp_path).put("before", b"as it was")
    before = _visible(tmp_path)
    with _writer(tmp_path, where) as writer:
        assert writer.wait(30) == -signal.SIGKILL
    own = tmp_path / ".nexusquant"
    assert len(list(own.glob("part-*"))) == (where != "renamed")
    assert int((own / "ledger").read_text()) >= sum(_visible(tmp_path).values())
    store = DirectoryStore(tmp_path)
    assert store.get("before") == b"as it was"
    if where == "renamed":
        assert store.get("key-0") == bytes(200_000)
    else:
        assert _visible(tmp_path) == before
    assert store.nbytes() == sum(_visible(tmp_path).values())  # counted anew
    assert not list(own.glob("part-*"))


def test_writers_killed_at_random_leave_whole_values(tmp_path: Path) -> None:
    survivor = DirectoryStore(tmp_path, 1_000_000)
    survivor.put("survivor", b"writes all the time")
    for attempt in range(12):
        with _writer(tmp_path, "anywhere") as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.003 * attempt)
            writer.kill()
        for value in survivor.get_many([f"key-{i}" for i in range(7)]):
            assert value is None or value == value[:1] * 200_000
        assert sum(_visible(tmp_path).values()) <= 1_000_000
        survivor.put("survivor", b"writes all the time")
    assert DirectoryStore(tmp_path, 1_000_000).nbytes() == sum(_visible(tmp_path).values())
    assert not list((tmp_path / ".nexusquant").glob("part-*"))


def test_a_value_that_is_being_written_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, other = os.write, DirectoryStore(tmp_path)

    def interrupted(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", write)
        other.put("other", b"first of this store: looks for leftovers")
        assert len(list((tmp_path / ".nexusquant").glob("part-*"))) == 1
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", interrupted)
    store = DirectoryStore(tmp_path)
    store.put("slow", b"a value")
    assert store.get("slow") == b"a value"


def test_a_lock_that_is_never_given_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexusquant.stores.ledger.TIMEOUT", 0.05)
    store = DirectoryStore(tmp_path)
    store.put("key", b"value")
    with locked(tmp_path / ".nexusquant" / "ledger"):
        with pytest.raises(StoreError, match=r"locked by another process"):
            store.put("key", b"another")
        assert store.get("key") == b"value"  # readers do not lock
    store.put("key", b"another")
