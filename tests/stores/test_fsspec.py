"""The fsspec store: failed writes, errors of any backend, what other processes change."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import FsspecStore


class BackendError(Exception):
    """What a backend's own library raises."""


def _fail(*args: Any, **kwargs: Any) -> None:
    raise BackendError("the backend is down")


def _or_error(call: Callable[[], object]) -> object:
    try:
        return call()
    except (BackendError, OSError) as error:
        return error


@pytest.fixture
def memory() -> FsspecStore:
    return FsspecStore(f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize("step", ["pipe_file", "mv"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = FsspecStore(f"local://{tmp_path}")
    store.put("key", b"before")

    def half(fs: LocalFileSystem, path: str, *rest: Any, **kwargs: Any) -> None:
        if step == "pipe_file":
            Path(path).write_bytes(b"half")
        raise BackendError("broken off")

    monkeypatch.setattr(LocalFileSystem, step, half)
    for key in ("key", "other"):
        with pytest.raises(StoreError, match=rf"cannot write {key} \(3 bytes\) \(BackendError"):
            store.put(key, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
    assert store.get("key") == b"before"


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_only_files_named_like_keys_are_values(tmp_path: Path, scheme: str) -> None:
    place = f"{scheme}://{tmp_path}/{uuid.uuid4().hex}"
    store = FsspecStore(place)
    store.put("key", b"value")
    fs, root = fsspec.url_to_fs(place)
    fs.pipe_file(f"{root}/.part-0123", b"of a writer that was killed")
    fs.pipe_file(f"{root}/not a key", b"")
    fs.makedirs(f"{root}/folder")
    fs.pipe_file(f"{root}/folder/file", b"")
    assert list(store.keys()) == ["key"]


def test_whatever_a_backend_raises_is_a_store_error(
    memory: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.put("key", b"value")
    for name in ("cat_file", "info", "pipe_file", "rm_file", "ls"):
        monkeypatch.setattr(MemoryFileSystem, name, _fail)
    calls = [
        lambda: memory.get("key"),
        lambda: memory.get_range("key", 1, 2),
        lambda: memory.get_many(["key"]),
        lambda: memory.size("key"),
        lambda: memory.contains("key"),
        lambda: memory.contains_many(["key"]),
        lambda: memory.put("key", b""),
        lambda: memory.delete("key"),
        lambda: memory.keys(),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="the backend is down"):
            call()


def test_ranges_as_s3_takes_them(memory: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, as the second argument is another one; no beginning at the end."""
    cat_file = MemoryFileSystem.cat_file

    def strict(
        fs: MemoryFileSystem, path: str, version: None = None, *, start: int, end: int | None
    ) -> bytes:
        if start >= fs.info(path)["size"]:
            raise BackendError("InvalidRange")
        return bytes(cat_file(fs, path, start, end))

    def ranges(fs: MemoryFileSystem, paths: list[str], start: int, end: None) -> list[object]:
        return [_or_error(partial(strict, fs, path, start=start, end=end)) for path in paths]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", strict)
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", ranges)
    memory.put("key", b"value")
    memory.put("empty", b"")
    assert memory.get("key") == b"value"
    assert memory.get("empty") == memory.get_range("empty", 0, 9) == b""
    assert memory.get_many(["key", "empty", "none"]) == [b"value", b"", None]
    assert memory.get_range("key", 0, 2) == b"va"
    assert memory.get_range("key", 4, 9) == b"e"
    assert memory.get_range("key", 5, 9) == b""
    assert memory.get_range("none", 5, 9) is None


def test_listings_are_not_remembered(memory: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = []
    monkeypatch.setattr(
        MemoryFileSystem, "invalidate_cache", lambda fs, path=None: forgotten.append(path)
    )
    for look in (memory.keys, lambda: memory.size("a"), lambda: memory.contains_many(["a"])):
        forgotten.clear()
        look()
        assert forgotten


def test_places_that_fsspec_does_not_open() -> None:
    wrong: Any
    for wrong in ("", None, b"memory://a"):
        with pytest.raises(ConfigError, match=r"a URL of type .*: give text that is not empty"):
            FsspecStore(wrong)
    with pytest.raises(ConfigError, match=r"nosuch://place with options .* not a place"):
        FsspecStore("nosuch://place")


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation(
        "nqmissing", "no_such_package.FileSystem", errtxt="Install no_such_package"
    )
    with pytest.raises(StoreError, match=r"nqmissing://place: Install no_such_package"):
        FsspecStore("nqmissing://user:hush@place")


def test_options_go_to_the_backend(tmp_path: Path) -> None:
    store = FsspecStore(f"local://{tmp_path}/a", auto_mkdir=True)
    store.put("key", b"value")
    assert (tmp_path / "a" / "key").read_bytes() == b"value"
