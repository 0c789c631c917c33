"""What is written is what is read, by any way in, and reading touches what it must."""

from __future__ import annotations

import io
import mmap
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexusquant import nxq
from nexusquant.errors import ConfigError, FormatError, StoreError
from tests.nxq.cases import SMALL, Content, contents, header_of, large, seal


class Counting:
    """A store's object that remembers which ranges were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ranges: list[tuple[int, int]] = []

    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return self.data[start:stop]


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
META = st.dictionaries(st.text(), JSON, max_size=4)
STREAMS = st.dictionaries(NAMES, st.lists(st.binary(max_size=200), max_size=4), max_size=5)


@given(META, STREAMS, st.data())
def test_round_trip(meta: dict[str, Any], streams: dict[str, list[bytes]], data: Any) -> None:
    about = {name: data.draw(META) for name in streams}
    packed = nxq.pack(meta, streams, about)
    reader = nxq.Reader.open(packed)
    reader.verify()
    assert contents(reader) == (meta, streams, {name: m for name, m in about.items() if m})
    assert list(reader.streams) == list(streams)
    assert {name: reader.size(name) for name in streams} == {
        name: sum(map(len, chunks)) for name, chunks in streams.items()
    }
    assert nxq.pack(*contents(reader)) == packed


@given(META, STREAMS)
def test_a_writer_made_from_the_specification_agrees(
    meta: dict[str, Any], streams: dict[str, list[bytes]]
) -> None:
    header = header_of(meta, {name: len(chunks) for name, chunks in streams.items()})
    assert seal(header, list(streams.values())) == nxq.pack(meta, streams)


def test_order_of_keys_does_not_matter_and_that_of_streams_does() -> None:
    streams = {"a": [b"1"], "b": [b"2"]}
    backwards = dict(reversed(streams.items()))
    assert nxq.pack({"x": 1, "y": 2}, streams) == nxq.pack({"y": 2, "x": 1}, streams)
    assert list(nxq.Reader.open(nxq.pack({}, backwards)).streams) == ["b", "a"]


@pytest.mark.parametrize("content", [SMALL, large(), ({}, {}, {})], ids=["small", "large", "none"])
def test_every_way_in_reads_the_same(content: Content, tmp_path: Path) -> None:
    data = nxq.pack(*content)
    path = tmp_path / "new" / "a.nxq"
    nxq.write_file(path, *content)
    assert path.read_bytes() == data
    with path.open("rb") as file, path.open("rb", buffering=0) as raw, path.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        for source in (
            data, bytearray(data), memoryview(data), mapped, path, str(path), io.BytesIO(data),
            file, raw, Counting(data),
        ):  # fmt: skip
            with nxq.Reader.open(source) as reader:
                reader.verify()
                assert contents(reader) == content
                assert reader.version == nxq.VERSION
        mapped.close()


def test_chunks_may_be_any_contiguous_buffer() -> None:
    square = memoryview(bytes(range(24))).cast("I", (2, 3))
    streams: dict[str, list[Any]] = {"a": [bytearray(b"xy"), memoryview(b"z"), square]}
    reader = nxq.Reader.open(nxq.pack({}, streams))
    assert contents(reader)[1] == {"a": [b"xy", b"z", bytes(range(24))]}


def test_opening_reads_once_and_a_chunk_is_read_alone() -> None:
    data = nxq.pack(*large())
    source = Counting(data)
    reader = nxq.Reader.open(source)
    assert source.ranges == [(0, min(len(data), 1 << 16))]
    source.ranges.clear()
    chunk = reader.read("layer.1", 5)
    ((start, stop),) = source.ranges
    assert data[start:stop] == chunk
    assert stop - start == len(chunk)


def test_neighbours_are_read_at_once() -> None:
    content = large()
    source = Counting(nxq.pack(*content))
    reader = nxq.Reader.open(source)
    source.ranges.clear()
    assert reader.read_range("layer.2", 3, 9) == content[1]["layer.2"][3:9]
    assert len(source.ranges) == 1
    assert reader.read_range("layer.2", 9, 9) == []
    assert len(source.ranges) == 1


def test_empty_chunks_ask_the_source_for_nothing() -> None:
    source = Counting(nxq.pack({}, {"a": [b"", b""]}))
    reader = nxq.Reader.open(source)
    reader.read("a", 1)
    assert source.ranges == [(0, len(source.data))]


def test_a_large_head_takes_two_reads() -> None:
    data = nxq.pack({}, {"a": [b"x"] * 10_000})
    source = Counting(data)
    reader = nxq.Reader.open(source)
    head = 36 + len(header_of({}, {"a": 10_000})) + 12 * 10_000
    assert source.ranges == [(0, 1 << 16), (1 << 16, head)]
    reader.verify()


def test_verify_reads_everything_once_and_tells_how_far_it_is() -> None:
    source = Counting(nxq.pack(*large()))
    reader = nxq.Reader.open(source)
    source.ranges.clear()
    steps: list[tuple[int, int]] = []
    reader.verify(lambda done, total: steps.append((done, total)))
    assert [stop for _, stop in source.ranges[:-1]] == [start for start, _ in source.ranges[1:]]
    assert source.ranges[-1][1] == len(source.data)
    assert steps[-1] == (len(source.data), len(source.data))
    assert len(steps) == sum(reader.streams.values())


def test_streams_start_aligned_in_the_mapped_file(tmp_path: Path) -> None:
    nxq.write_file(tmp_path / "a.nxq", *SMALL)
    data = (tmp_path / "a.nxq").read_bytes()
    for chunk in (b"\1\2\3", b"page 0", b"z" * 70):
        assert data.index(chunk) % 64 == 0


def test_chunks_of_a_path_outlive_the_reader_and_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.nxq"
    nxq.write_file(path, *SMALL)
    with nxq.Reader.open(path) as reader:
        chunk = reader.read("tail", 0)
        assert chunk.readonly
        path.unlink()
    assert chunk == b"z" * 70
    with pytest.raises(ConfigError, match="closed"):
        reader.read("tail", 0)
    reader.close()


class Slow(io.BytesIO):
    """A file that gives few bytes at once, and other threads the time to move it."""

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0)
        return super().read(min(99, size or 0))


def test_threads_may_share_a_reader_of_an_open_file() -> None:
    content = large(chunks=8)
    reader = nxq.Reader.open(Slow(nxq.pack(*content)))
    found: list[Content] = []
    threads = [Thread(target=lambda: found.append(contents(reader))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 4


def test_the_digest_tells_files_apart() -> None:
    one, same, other = (nxq.Reader.open(nxq.pack({}, {"a": [x]})) for x in (b"1", b"1", b"2"))
    assert one.digest == same.digest != other.digest


def test_what_is_not_there_is_named() -> None:
    reader = nxq.Reader.open(nxq.pack(*SMALL), name="p.nxq")
    with pytest.raises(FormatError, match=r"p\.nxq: no stream 'x', there are tokens, layer\.0"):
        reader.read("x", 0)
    for chunk in (3, -1):
        with pytest.raises(FormatError, match=r"p\.nxq: stream 'layer\.0' has 3 chunks"):
            reader.read("layer.0", chunk)

    wrong: Any
    for wrong in (None, ["layer.0"]):
        with pytest.raises(FormatError, match=r"p\.nxq: no stream "):
            reader.read(wrong, 0)
    for wrong in ("0", 0.5, None):
        with pytest.raises(ConfigError, match=r"chunk=.*: must be an integer"):
            reader.read("layer.0", wrong)
        with pytest.raises(ConfigError, match=r"stop=.*: must be an integer"):
            reader.read_range("layer.0", 0, wrong)


def test_what_is_no_bytes_to_read() -> None:
    data = nxq.pack(*SMALL)
    with pytest.raises(ConfigError, match="StringIO is nothing to read"):
        nxq.Reader.open(io.StringIO("text"))
    with pytest.raises(ConfigError, match=r"this memoryview cannot be read .*contiguous"):
        nxq.Reader.open(memoryview(data)[::2])
    released = memoryview(data)
    released.release()
    with pytest.raises(ConfigError, match=r"this memoryview cannot be read .*released"):
        nxq.Reader.open(released)
    with tempfile.NamedTemporaryFile("w+") as text:
        text.write("x" * 100)
        with pytest.raises(ConfigError, match=r"reading gives str.*binary mode"):
            nxq.Reader.open(text, "text")


def test_a_file_that_was_closed_meanwhile(tmp_path: Path) -> None:
    nxq.write_file(tmp_path / "a.nxq", *SMALL)
    with (tmp_path / "a.nxq").open("rb") as file:
        reader = nxq.Reader.open(file)
    with pytest.raises(StoreError, match=r"a\.nxq: bytes .* cannot be read .*closed file"):
        reader.read("tail", 0)
    with pytest.raises(StoreError, match=r"a\.nxq: its size cannot be read .*closed file"):
        nxq.Reader.open(file)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, "a\0b"):
        with pytest.raises(StoreError, match="cannot be opened"):
            nxq.Reader.open(path)
    with pytest.raises(ConfigError, match="int is nothing to read"):
        nxq.Reader.open(3)


def test_sources_that_fail() -> None:
    source = Counting(nxq.pack(*SMALL))
    reader = nxq.Reader.open(source, "there")
    source.data = source.data[:-1]
    with pytest.raises(FormatError, match="there: 69 bytes came for the 70 from byte"):
        reader.read("tail", 0)

    class Broken(Counting):
        def read(self, start: int, stop: int) -> bytes:
            raise error

    error: OSError = OSError("gone")
    with pytest.raises(StoreError, match=r"there: bytes 0 to .* cannot be read \(gone\)"):
        nxq.Reader.open(Broken(source.data), "there")
    error = StoreError("of the store itself")
    with pytest.raises(StoreError, match=r"^of the store itself$"):
        nxq.Reader.open(Broken(source.data), "there")


def test_mapped_files_leave_no_handle_behind() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nxq"
        for data in (b"", b"x", nxq.pack(*SMALL)[:-1]):
            path.write_bytes(data)
            with pytest.raises(FormatError, match=r"a\.nxq"):
                nxq.Reader.open(path)
