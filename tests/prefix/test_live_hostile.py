"""Live files whose digests are right and whose content lies: FormatError, and nothing else."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest
import zstandard

from nexusquant.prefix.payloads import MOST
from tests.prefix.live_lies import KINDS, File, Path, at, change, leaves, survives

pytestmark = pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning")

WRONG: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 1 << 16, 1 << 30, (1 << 30) - 1, 1 << 31, 1 << 52,
    0.0, 0.5, -1.5, 1e300, "", "raw", "uint8", "float16", "float32", "float64", "9", "gaps", "bits",
    "run", "os", [], [[]], [0], [1, 0], {}, {"a": 1},
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_missing_or_new(kind: str) -> None:
    whole = File(kind)
    for name, about in whole.abouts.items():
        for path in leaves(about):
            if isinstance(path[-1], int) or path[-1] == "fresh":  # which may be missing
                continue
            file = whole.clone()
            holder = at(file.abouts[name], path[:-1])
            if holder is about.get("config"):
                continue
            del holder[path[-1]]
            if name == "header" and path[0] == "config":  # fields have defaults
                continue
            file.refused()
        file = whole.clone()
        file.abouts[name]["more"] = 1
        file.refused("unknown members 'more'")


@pytest.mark.parametrize("kind", KINDS)
def test_random_lies(kind: str) -> None:
    whole, source, passed = File(kind), random.Random(0), 0
    undamaged = whole.data()
    places = [
        (name, path) for name, about in whole.abouts.items() for path in leaves(about)
        if (name, path[:1]) != ("header", ("model",))
    ]  # fmt: skip
    for _ in range(150):
        file = whole.clone()
        for _ in range(source.choice((1, 1, 1, 2, 4))):
            name, path = source.choice(places)
            try:
                old = at(file.abouts[name], path)
                assert isinstance(at(file.abouts[name], path[:-1]), (dict, list))
            except (LookupError, TypeError, AssertionError):  # an earlier lie took its place
                continue
            near = [old + d for d in (-1, 1, 8)] if type(old) is int else []
            change(file.abouts[name], path, source.choice([*near, *near, *WRONG]))
        passed += survives(file, undamaged)
    assert passed < 75


LIES: list[tuple[str, str, Path, Any, str]] = [
    ("plain", "header", ("sequences",), 3, "batch must be"),
    ("plain", "header", ("sequences",), 0, "tokens of no sequence"),
    ("plain", "header", ("sequences",), 1 << 21, "sequences must be"),
    ("plain", "header", ("tokens",), 74, "length"),
    ("plain", "header", ("tokens",), 1 << 31, "tokens must be"),
    ("plain", "header", ("layers",), 4, "layers must be an integer from 3 to 3"),
    ("plain", "header", ("version",), 2, "version must be"),
    ("plain", "header", ("config", "tiers"), "many", "tiers"),
    ("plain", "header", ("config", "codec"), "exact", "not of one layer"),
    ("plain", "header", ("config", "scorer"), "no such", "register_scorer"),
    ("plain", "header", ("profile",), "x", "profile must be 32 hex digits"),
    ("plain", "layer.0", ("kind",), "sliding", "another kind than the model's, full"),
    ("plain", "layer.0", ("record_past",), 1, "record_past must be true or false"),
    ("plain", "layer.0", ("held", "heads"), 4, "the model's are"),
    ("plain", "layer.0", ("held", "dims"), [16, 24], "the model's are"),
    ("plain", "layer.0", ("held", "dims"), [16, 0], "dims must be"),
    ("plain", "layer.0", ("held", "dims"), [16, 16, 16], "dims must be"),
    ("plain", "layer.0", ("held", "dtype"), "int16", "dtype must be one of"),
    ("plain", "layer.0", ("held", "rope"), 2, "rope must be"),
    ("plain", "layer.0", ("held", "rope"), -1, "rope must be"),
    ("plain", "layer.1", ("held", "rope"), 1, "rope.1: missing"),
    ("plain", "layer.0", ("held", "exact"), True, "never compressed holds codes"),
    ("plain", "layer.0", ("held", "tail", "count"), 6, "bytes"),
    ("plain", "layer.0", ("held", "tail", "count"), 1 << 29, "count must be"),
    ("plain", "layer.0", ("held", "tail", "dtypes"), ["float16"], "dtypes must be"),
    ("plain", "layer.0", ("held", "tail", "dtypes"), ["uint8", "uint8"], "dtypes must be"),
    ("plain", "layer.0", ("held", "tail", "dtypes", 0), "float64", "bytes"),
    ("plain", "layer.0", ("held", "stored", "codings", 0, "basis"), "profile", "does not know"),
    ("plain", "layer.0", ("held", "stored", "codings", 0, "basis"), "dct", "basis must be"),
    ("plain", "layer.0", ("held", "stored", "codings", 0, "key", "mean"), "int32", "mean must"),
    ("plain", "layer.0", ("held", "stored", "codings", 0, "key", "scale", "dims"), 8, "1 or 16"),
    ("plain", "layer.0", ("held", "stored", "codings"), [], "coding must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "coding"), 1, "coding must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "rates", 0), ["22"], "rates must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "rates", 0), ["2", "2"], "rates must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "rates", 0, 0), "29", "from 0 to 8"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "rates", 0, 0), "2٣", "from 0 to 8"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "rates", 0, 0), "88", "key rows"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "count"), -1, "count must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "count"), 1 << 40, "count must"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "start"), -4, "start must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "kind"), "all", "kind must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "rows"), 3, "rows must be"),
    ("plain", "layer.0", ("held", "stored", "coded", 0, "slots", "last"), 75, "last must be"),
    ("plain", "layer.0", ("held", "stored", "sinks", "heads"), [0, 1], "sinks of some heads"),
    ("plain", "rope.0", ("module",), "os", "module must be one of transformers.models.llama"),
    ("plain", "rope.0", ("module",), "nexusquant.hf.rope_tables", "module must be one of"),
    ("plain", "rope.0", ("batch",), 1, "batch must be an integer from 2 to 2"),
    ("plain", "rope.0", ("spans",), [], "more than its description"),
    ("plain", "rope.0", ("spans", 0, "frequencies"), 1 << 40, "frequencies must be"),
    ("plain", "rope.0", ("spans", 0, "length"), 1 << 29, "length must be"),
    ("plain", "rope.0", ("spans", 0, "scaling"), 0.0, "scaling must be"),
    ("plain", "rope.0", ("spans", 0, "tiling"), "thirds", "tiling must be"),
    ("uneven", "layer.0", ("held", "stored", "coded", -1, "heads"), [1, 0], "heads must be"),
    ("uneven", "layer.0", ("held", "stored", "coded", -1, "heads"), [2], "heads must be"),
    ("uneven", "layer.0", ("held", "stored", "coded", -1, "heads"), [], "heads must be"),
    ("uneven", "layer.0", ("held", "stored", "coded", -1, "like"), -1, "like must be"),
    ("uneven", "layer.0", ("held", "stored", "coded", -1, "like"), 99, "like must be"),
    ("fresh", "layer.0", ("held", "stored", "fresh"), 1, "fresh must be true or false"),
    ("uneven", "layer.0", ("held", "stored", "fresh"), True, "coded like no others"),
    ("bounded", "layer.0", ("held", "tail", "queries", "heads"), 3, "multiple of 2"),
    ("bounded", "layer.0", ("held", "tail", "queries", "count"), 33, "count must be"),
    ("sliding", "layer.0", ("held", "gone"), 76, "gone must be"),
    ("hybrid", "layer.0", ("states", "kernels", 0), 3, "convolutions"),
    ("hybrid", "layer.0", ("states", "conv_states"), [], "conv_states must be"),
    ("hybrid", "layer.0", ("states", "conv_states", 0, "shape", 0), 2, "shape must be"),
    ("hybrid", "layer.0", ("states", "conv_states", 0, "shape"), [1] * 9, "shape must be"),
    ("hybrid", "layer.0", ("states", "recurrent_states", 0, "shape", 1), 1 << 29, "bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "stream", "path", "value", "match"), LIES)
def test_single_lies(kind: str, stream: str, path: Path, value: Any, match: str) -> None:
    file = File(kind)
    change(file.abouts[stream], path, value)
    file.refused(match)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_that_are_missing_new_longer_or_shorter(kind: str) -> None:
    whole = File(kind)
    for name, chunks in whole.streams.items():
        for i in range(len(chunks)):
            for new in ([], [chunks[i]] * 2, [chunks[i] + b"x"], [chunks[i][:-1]], [b""]):
                if new == [chunks[i]] or (i and not chunks[i]):
                    continue
                file = whole.clone()
                file.abouts.pop(name)
                file.streams[name][i : i + 1] = new
                file.refused()
        file = whole.clone()
        file.abouts.pop(name)
        file.streams[name] = []
        file.refused("missing")
        del file.streams[name]
        file.refused("missing")


@pytest.mark.parametrize("codec", ["raw", "zstd+delta"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes(kind: str, codec: str) -> None:
    whole, source = File(kind, codec), random.Random(0)
    undamaged = whole.data()
    for _ in range(20):
        file = whole.clone()
        name = source.choice(list(file.streams))
        index = source.randrange(1, len(file.streams[name]))
        chunk = bytearray(file.streams[name][index])
        for _ in range(min(len(chunk), source.choice((1, 2, 20)))):
            chunk[source.randrange(len(chunk))] = source.choice((0, 1, 127, 128, 255))
        file.streams[name][index] = bytes(chunk)
        survives(file, undamaged)


def test_a_description_that_is_not_canonical_or_too_long() -> None:
    for raw in (
        b"",
        b"{}",
        b"[]",
        b"{ }",
        b'{"a":1,"a":1}',
        b"[" * 5000,
        b"\xff",
        b"1" * (1 << 21),
    ):
        file = File("plain")
        file.abouts.pop("layer.0")
        file.streams["layer.0"][0] = raw
        file.refused("layer.0")


def largest(file: File) -> tuple[str, int]:
    """The longest tensor."""
    sizes = {
        (name, i): len(chunk)
        for name, chunks in file.streams.items()
        for i, chunk in enumerate(chunks)
        if i
    }
    return max(sizes, key=lambda at: sizes[at])


def test_compressed_chunks_that_lie_about_their_size() -> None:
    plain = File("plain")
    name, i = largest(plain)
    data = plain.streams[name][i]
    frame = zstandard.ZstdCompressor(level=19).compress(data)
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    more = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    fewer = zstandard.ZstdCompressor().compress(data[:-1])
    good = File("plain", "zstd")
    for chunk in (data, frame):
        file = good.clone()
        file.streams[name][i] = chunk
        file.load()
    for chunk in (sizeless, more, fewer, frame + b"x", frame + frame, frame[:-1], frame[:9], b"x"):
        file = good.clone()
        file.streams[name][i] = chunk
        file.refused("chunk")


@pytest.mark.parametrize("codec", ["raw", "zstd", "zstd+delta"])
def test_nothing_is_allocated_that_the_file_does_not_justify(codec: str) -> None:
    whole = File("plain", codec)
    size = len(whole.data())
    sequences, tokens = whole.abouts["header"]["sequences"], (1 << 30) - 1
    tail = ("layer.0", ("held", "tail", "count"))
    claims: list[list[tuple[str, Path, Any]]] = [
        [("header", ("sequences",), 1 << 20), ("rope.0", ("batch",), 1 << 20)],
        [("header", ("tokens",), tokens), (*tail, 1 << 20)],
        [("header", ("tokens",), tokens), (*tail, tokens)],
        [("header", ("tokens",), tokens), ("rope.0", ("spans", 0, "length"), tokens)],
        [("rope.0", ("spans", 0, "frequencies"), 1 << 16)],
        [("header", ("tokens",), tokens),
         ("layer.0", ("held", "stored", "coded", 0, "slots", "count"), 1 << 24)],
        [("header", ("tokens",), tokens),
         ("layer.0", ("held", "stored", "coded", 0, "slots", "last"), 1 << 28)],
    ]  # fmt: skip
    assert sequences == 2
    for claim in claims:
        file = whole.clone()
        for name, path, value in claim:
            change(file.abouts[name], path, value)
        tracemalloc.start()
        try:
            file.refused()
            assert tracemalloc.get_traced_memory()[1] < 20 * size
        finally:
            tracemalloc.stop()


def test_a_bomb() -> None:
    file = File("plain", "zstd")
    count = 1 << 20
    held = file.abouts["layer.0"]["held"]
    file.abouts["header"]["tokens"] = held["tail"]["count"] = count
    held["rope"] = None
    size = 2 * 2 * 16 * 4 * count
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    assert MOST * len(frame) < 1 << 24
    file.streams["layer.0"][1:3] = [frame] * (2 * size >> 24)
    file.refused(f"a chunk of {len(frame)} bytes cannot stand for {1 << 24}")
