"""The directory store: what goes first, what is not its own, memory maps, full disks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import directory
from nexusquant.stores.directory import DirectoryStore


def _keys(store: DirectoryStore) -> str:
    return "".join(sorted(store.keys()))


def _fill(store: DirectoryStore, keys: str, size: int = 100) -> None:
    for key in keys:
        store.put(key, bytes(size))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, 500)
    _fill(store, "abcde")
    store.get("a")
    store.get_range("c", 0, 1)
    view = store.open_mmap("e")
    assert view is not None
    store.contains("b")  # no use
    store.size("d")
    _fill(store, "f")
    assert _keys(store) == "acdef"
    _fill(store, "g")
    assert _keys(store) == "acefg"
    store.put("h", bytes(250))
    assert _keys(store) == "fgh"
    view.close()


def test_other_stores_of_the_directory_count_as_uses(tmp_path: Path) -> None:
    mine, theirs = DirectoryStore(tmp_path, 300), DirectoryStore(tmp_path, 300)
    _fill(mine, "abc")
    _fill(mine, "d")  # has listed the directory: a is gone, b is next
    theirs.get("b")
    _fill(theirs, "c")
    _fill(mine, "e")
    assert _keys(mine) == "bce"
    _fill(mine, "f")
    assert _keys(theirs) == "cef"


def test_replacing_counts_only_the_difference(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, 300)
    _fill(store, "abc")
    store.put("b", bytes(100))
    assert _keys(store) == "abc"
    store.put("c", bytes(101))
    assert _keys(store) == "bc"
    store.put("b", bytes(300))
    assert _keys(store) == "b"
    assert store.nbytes() == 300
    store.put("b", b"")
    store.delete("b")
    assert store.nbytes() == 0


def test_too_large_a_value_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, 300)
    _fill(store, "abc")
    with pytest.raises(StoreError, match=r"d has 301 bytes, the store may take 300"):
        store.put("d", bytes(301))
    assert _keys(store) == "abc"
    store.put("d", bytes(300))
    assert _keys(store) == "d"


def test_a_fuller_directory_is_brought_down_to_the_limit(tmp_path: Path) -> None:
    _fill(DirectoryStore(tmp_path), "abcde")
    assert _keys(DirectoryStore(tmp_path, 250)) == "de"


_USES = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([None, 0, 10, 40, 99, 100])),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(uses=_USES)
def test_eviction_is_exactly_lru(tmp_path_factory: pytest.TempPathFactory, uses: list) -> None:
    path = tmp_path_factory.mktemp("lru")
    stores = [DirectoryStore(path, 200, sync=False) for _ in range(2)]
    model: dict[str, int] = {}  # oldest first
    for turn, (key, size) in enumerate(uses):
        store = stores[turn % 2]
        if size is None:
            assert (store.get(key) is not None) == (key in model)
            if key in model:
                model[key] = model.pop(key)
        else:
            store.put(key, bytes(size))
            model.pop(key, None)
            while sum(model.values()) + size > 200:
                del model[next(iter(model))]
            model[key] = size
        assert sorted(store.keys()) == sorted(model)
        assert store.nbytes() == sum(model.values())


def test_listings_are_as_good_when_they_are_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_CANDIDATES", 2)
    store = DirectoryStore(tmp_path, 800)
    _fill(store, "abcdefgh")
    store.put("x", bytes(650))  # three listings
    assert _keys(store) == "hx"


def test_foreign_files_are_left_alone_and_not_counted(tmp_path: Path) -> None:
    foreign = ["notes.txt", "a", "a.00000000", "a.nxq", ".hidden", ".nexusquant/mine", "b/c.txt"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    store = DirectoryStore(tmp_path, 300)
    (store.path_of("folder")).mkdir()
    (store.path_of("link")).symlink_to(tmp_path / "notes.txt")
    _fill(store, "abcde")
    assert _keys(store) == "cde"
    assert store.nbytes() == 300
    assert [(tmp_path / name).stat().st_size for name in foreign] == [1000] * len(foreign)


def test_a_map_outlives_eviction_and_replacement(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, 3_000_000)
    values = {key: os.urandom(1_000_000) for key in "ab"}
    for key, value in values.items():
        store.put(key, value)
    views = {key: store.open_mmap(key) for key in "ab"}
    store.put("a", b"replaced")
    store.put("c", bytes(3_000_000))
    assert _keys(store) == "c"
    for key, view in views.items():
        assert view is not None
        assert view[:] == values[key]
        view.close()
    assert store.open_mmap("a") is None
    store.put("empty", b"")
    with pytest.raises(StoreError, match="empty and cannot be mapped"):
        store.open_mmap("empty")
    with pytest.raises(ConfigError, match="not a key"):
        store.path_of("../a")


def test_a_wiped_directory_starts_anew(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store", 300)
    _fill(store, "abc")
    shutil.rmtree(tmp_path / "store")
    assert store.get("a") is None
    _fill(store, "defg")
    assert _keys(store) == "efg"
    assert store.nbytes() == 300


@pytest.mark.parametrize("ledger", [b"", b"123", b"x" * 21, b"9" * 500])
def test_a_damaged_ledger_is_counted_anew(tmp_path: Path, ledger: bytes) -> None:
    store = DirectoryStore(tmp_path, 300)
    _fill(store, "abc")
    (tmp_path / ".nexusquant" / "ledger").write_bytes(ledger)
    _fill(store, "d")
    assert _keys(store) == "bcd"
    assert store.nbytes() == 300


def test_reading_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(DirectoryStore(tmp_path), "a")
    shutil.rmtree(tmp_path / ".nexusquant")

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    store = DirectoryStore(tmp_path)
    assert store.get("a") == bytes(100)
    assert list(store.keys()) == ["a"]
    assert not (tmp_path / ".nexusquant").exists()


def test_a_handle_gone_stale_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)
    _fill(store, "a")

    def stale(descriptor: int) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        assert store.get("a") is None
    assert store.get("a") == bytes(100)


def test_places_that_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="cannot open the store"):
            DirectoryStore(path)
    assert (tmp_path / "file").is_file()
    wrong: list[Any] = [0, -1, 1.5, True, "2GiB"]
    for limit in wrong:
        with pytest.raises(ConfigError, match="must be an integer of at least 1"):
            DirectoryStore(tmp_path, limit)
    text: Any = "false"
    with pytest.raises(ConfigError, match="sync='false': must be True or False"):
        DirectoryStore(tmp_path, sync=text)
    for path in ("", "a\0b"):
        with pytest.raises(ConfigError, match=r"path=.*: must be that of a directory"):
            DirectoryStore(path)
    number: Any = 3
    with pytest.raises(ConfigError, match="not a path"):
        DirectoryStore(number)


@pytest.mark.parametrize("limit", [None, 300])
def test_nothing_is_made_before_the_first_put(tmp_path: Path, limit: int | None) -> None:
    path = tmp_path / "typo" / "below"
    store = DirectoryStore(path, limit)
    assert store.get("a") is store.get_range("a", 0, 3) is store.open_mmap("a") is None
    assert store.contains_many(["a", "b"]) == [False, False]
    assert list(store.keys()) == []
    assert store.nbytes() == 0
    store.delete("a")
    assert list(tmp_path.iterdir()) == []
    store.put("a", bytes(200))
    store.put("b", bytes(200))
    assert _keys(store) == ("ab" if limit is None else "b")
    assert _keys(DirectoryStore(path, limit)) == _keys(store)


def test_a_place_that_cannot_be_made_says_so_when_it_is_written(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "later")
    (tmp_path / "later").touch()
    with pytest.raises(StoreError, match=r"cannot write key .*Check path and permissions"):
        store.put("key", b"value")


_FULL = """
import resource, sys
from nexusquant.errors import StoreError
from nexusquant.stores.directory import DirectoryStore

store = DirectoryStore(sys.argv[1], 50_000_000)
if sys.argv[2] == "files":
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
values = {key: key.encode() * 100_000 for key in "abc"}
for key, value in values.items():
    store.put(key, value)
for key in "ad":
    try:
        store.put(key, bytes(5_000_000))
    except StoreError as error:
        assert "Free some space" in str(error), error
    else:
        raise AssertionError("there was room")
assert {key: store.get(key) for key in store.keys()} == values
assert store.nbytes() == 300_000
assert [x.name for x in (store.path / ".nexusquant").iterdir()] == ["ledger"]
store.put("d", b"small")
assert store.get("d") == b"small"
print("fine")
"""


@pytest.mark.parametrize("full", ["files", "disk"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, full: str) -> None:
    command = [sys.executable, "-c", _FULL, str(tmp_path), full]
    if full == "disk":  # of a megabyte, in a mount namespace that ends with the process
        mount = f"mount -t tmpfs -o size=1m none '{tmp_path}'"
        unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*unshare, mount], capture_output=True).returncode:
            pytest.skip("this machine does not let its users mount anything")
        command = [*unshare, f'{mount} && exec "$@"', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n", done.stderr
