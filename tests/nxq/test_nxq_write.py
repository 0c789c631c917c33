"""What the writer refuses, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexusquant import nxq
from nexusquant.errors import ConfigError, StoreError
from tests.nxq.cases import SMALL, contents


class Chunks(list[bytes]):
    """Chunks of which the third is not to be had."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([b"x" * 100_000] * 3)
        self.error = error

    def __iter__(self) -> Iterator[bytes]:
        yield from self[:2]
        raise self.error


def test_depth_and_integers_up_to_the_limit() -> None:
    deep: Any = []
    for _ in range(13):  # 16 levels with header, meta and a
        deep = [deep]
    meta = {"a": deep, "n": [2**53 - 1, 1 - 2**53]}
    assert nxq.Reader.open(nxq.pack(meta, {})).meta == meta
    with pytest.raises(ConfigError, match="nested deeper than 16"):
        nxq.pack({"a": [deep]}, {})


itself: list[Any] = []
itself.append(itself)
BAD_META: list[tuple[Any, str]] = [
    ([], "dictionaries"), (None, "dictionaries"), ({1: 2}, "key 1 is not a string"),
    ({"a": float("nan")}, "NaN or infinity"), ({"a": float("-inf")}, "NaN or infinity"),
    ({"a": 2**53}, "53 bits"), ({"a": b""}, "bytes is no type of JSON"),
    ({"a": {1, 2}}, "set is no type"), ({"a": itself}, "nested deeper"),
    ({"a": "\ud800"}, "surrogates"), ({"a": "x" * 2**20}, "at most 1048576"),
]  # fmt: skip


@pytest.mark.parametrize(("meta", "match"), BAD_META, ids=[match for _, match in BAD_META])
def test_meta_that_is_no_json(meta: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        nxq.pack(meta, {})
    if isinstance(meta, dict):
        with pytest.raises(ConfigError, match=match):
            nxq.pack({}, {"a": []}, {"a": meta})


@pytest.mark.parametrize("name", ["", " ", "a b", "é", "x" * 65, ".hidden", "a/b", "a\n", 3])
def test_names_that_the_format_does_not_have(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"no name of a stream|is not a string"):
        nxq.pack({}, {name: [b""]})


def test_streams_that_are_no_collections_of_chunks() -> None:
    bad: list[tuple[Any, str]] = [
        (iter([b""]), "does not say how many"), (b"abc", "not int"), ([3], "not int"),
        (["text"], "not str"), ([memoryview(b"abcdef")[::2]], "contiguous"),
    ]  # fmt: skip
    for chunks, match in bad:
        with pytest.raises(ConfigError, match=match):
            nxq.pack({}, {"a": chunks})
    with pytest.raises(ConfigError, match=r"streams that are not there: \{'b'\}"):
        nxq.pack({}, {"a": []}, {"b": {}})
    wrong: Any
    for wrong in ({"a": 3}, 5, 0, [{}]):
        with pytest.raises(ConfigError, match="dictionaries"):
            nxq.pack({}, {"a": []}, wrong)
    for wrong in (None, [b"x"], 5):
        with pytest.raises(ConfigError, match=r"streams is a .*: give a dictionary of lists"):
            nxq.pack({}, wrong)
        with pytest.raises(ConfigError, match=r"chunks=.*: must be a dictionary"):
            nxq.Writer(io.BytesIO(), {}, wrong)
    for wrong in (io.StringIO(), None):
        with pytest.raises(ConfigError, match="no binary file"):
            nxq.Writer(wrong, {}, {})


def test_numbers_that_the_format_does_not_have() -> None:
    counts: list[Any] = [-1, 2**22 + 1, 1.5, True]
    for count in counts:
        with pytest.raises(ConfigError, match=f"stream 'a' has {count} chunks"):
            nxq.Writer(io.BytesIO(), {}, {"a": count})
    with pytest.raises(ConfigError, match="8388608 chunks, at most 4194304"):
        nxq.Writer(io.BytesIO(), {}, {"a": 2**22, "b": 2**22})


def test_a_chunk_of_four_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexusquant.nxq.v1.MAX_CHUNK", 100)  # in place of 4 GiB
    nxq.pack({}, {"a": [bytes(100)]})
    with pytest.raises(ConfigError, match="101 bytes, at most 100"):
        nxq.pack({}, {"a": [bytes(101)]})


def test_writer_step_by_step() -> None:
    meta, streams, about = SMALL
    file = io.BytesIO()
    counts = {name: len(chunks) for name, chunks in streams.items()}
    writer = nxq.Writer(file, meta, counts, about)
    with pytest.raises(ConfigError, match=r"'layer\.0' where one of 'tokens' is next"):
        writer.add("layer.0", b"")
    writer.add("tokens", streams["tokens"][0])
    with pytest.raises(ConfigError, match="4 of 5 chunks were not written"):
        writer.finish()
    for name in ("layer.0", "tail"):
        for chunk in streams[name]:
            writer.add(name, chunk)
    with pytest.raises(ConfigError, match=r"'tail' where none is next"):
        writer.add("tail", b"")
    with pytest.raises(ValueError, match=r"not an \.nxq file"):
        nxq.Reader.open(file)
    writer.finish()
    assert file.getvalue() == nxq.pack(*SMALL)


def test_an_old_file_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.nxq"
    for content in (SMALL, ({"codec": "x"}, {"a": [b"1"]}, {})):
        nxq.write_file(path, *content)
        assert contents(nxq.Reader.open(path)) == content
    assert [file.name for file in path.parent.iterdir()] == ["a.nxq"]


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive, and be alone in its folder, whatever the test does."""
    path = tmp_path / "kept" / "a.nxq"
    nxq.write_file(path, *SMALL)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.nxq"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), MemoryError()], ids=repr)
def test_an_interrupted_write(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        nxq.write_file(old, {}, {"a": Chunks(error)})


def test_a_caller_that_errs(old: Path) -> None:
    with pytest.raises(ConfigError):
        nxq.write_file(old, {"a": float("nan")}, {})
    chunks: list[Any] = [b"x", 3]
    with pytest.raises(ConfigError):
        nxq.write_file(old, {}, {"a": chunks})


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_a_disk_that_does_not_take_it(
    old: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, attribute = {
        "write": (nxq.Writer, "add"), "fsync": (os, "fsync"), "replace": (Path, "replace"),
    }[name]  # fmt: skip
    monkeypatch.setattr(owner, attribute, full)
    with pytest.raises(StoreError, match=r"a\.nxq: not written .*No space left.*still is"):
        nxq.write_file(old, {}, {"a": [b"x"]})


@pytest.fixture
def small_files() -> Iterator[None]:
    """This process cannot write files of more than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_limit_of_the_system(old: Path) -> None:
    with pytest.raises(StoreError, match="File too large"):
        nxq.write_file(old, {}, {"a": [os.urandom(1 << 17)]})
    with pytest.raises(StoreError, match="File too large"):  # only when the buffer is emptied
        nxq.write_file(old, {}, {"a": [bytes(1 << 16)]})


def test_places_where_no_file_can_be(old: Path) -> None:
    for path in (old / "below", old.parent, "a\0b", "", "/"):
        with pytest.raises(StoreError, match="not written"):
            nxq.write_file(path, {}, {})


@pytest.mark.parametrize("chunks", [1, 500])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, chunks: int) -> None:
    path = tmp_path / "a.nxq"
    nxq.write_file(path, *SMALL)
    program = f"""
import os, signal
from nexusquant import nxq
with nxq.atomic_file({str(path)!r}) as file:
    writer = nxq.Writer(file, {{}}, {{"a": {chunks}}})
    for _ in range({chunks}):
        writer.add("a", bytes(1000))
    writer.finish()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert path.read_bytes() == nxq.pack(*SMALL)
    (part,) = tmp_path.glob(".a.nxq.*.part")
    part.unlink()


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    nxq.write_file(tmp_path / "a.nxq", *SMALL)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.nxq").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_one_and_permissions_too(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    nxq.write_file(real, {}, {"a": [b"old"]})
    real.chmod(0o600)
    link.symlink_to(real)
    nxq.write_file(link, {}, {"a": [b"new"]})
    assert link.is_symlink()
    assert bytes(nxq.Reader.open(real).read("a", 0)) == b"new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert sorted(x.name for x in tmp_path.iterdir()) == ["link", "real"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    paths: list[Any] = [fifo, tmp_path, "/dev/null", None, "a\0b"]
    for path in paths:
        with pytest.raises(StoreError, match="not the path of a file"):
            nxq.write_file(path, {}, {})
    assert fifo.is_fifo()
