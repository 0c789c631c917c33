"""The worker's side on caches without vLLM: what is saved is loaded, and all that can go wrong."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.vllm.blocks import BlockCodec, Layers, RawCodec
from nexusquant.vllm.counters import COUNTERS, Counters
from nexusquant.vllm.e8 import E8Codec
from nexusquant.vllm.guard import Guard
from nexusquant.vllm.keys import store_key
from nexusquant.vllm.layouts import Layout
from nexusquant.vllm.lookup import Lookup
from nexusquant.vllm.planner import Block, Load
from nexusquant.vllm.transfer import Transfer
from tests.vllm_cases import Memory

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 3, 24, 2, 16, 8
BLOCK_BYTES = LAYERS * HEADS * TOKENS * 2 * DIM * 4
LOGGER = logging.getLogger("test.transfer")


class Worker:
    """A transfer with its caches and its store."""

    def __init__(self, codec: BlockCodec, queue_bytes: int = 1 << 20) -> None:
        generator = torch.Generator().manual_seed(0)
        self.store, self.counters = Memory(), Counters()
        self.guard = Guard(lambda: self.store, self.counters, LOGGER, 0.0)
        self.transfer = Transfer(
            codec, self.guard, "t0p0", TOKENS, self.counters, LOGGER, 2, queue_bytes
        )
        shape = (BLOCKS, HEADS, TOKENS, 2 * DIM)
        self.caches = [torch.randn(shape, generator=generator) for _ in range(LAYERS)]
        side = (HEADS, TOKENS, DIM)
        self.transfer.register(self.caches, [Layout(side, side)] * LAYERS)

    def contents(self, ids: Sequence[int]) -> Tensor:
        return torch.stack([cache[list(ids)] for cache in self.caches])

    def load(self, blocks: list[Block], request: str = "r") -> set[int]:
        """The blocks that failed, when it is over."""
        self.transfer.load(Load(request, blocks))
        failed: set[int] = set()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            finished, more = self.transfer.finished(idle=True)
            failed |= more
            if request in finished:
                return failed
        raise AssertionError("never reported")


@pytest.fixture
def raw() -> Iterator[Worker]:
    worker = Worker(RawCodec())
    yield worker
    worker.transfer.close()


def blocks(ids: Sequence[int]) -> list[Block]:
    return [Block(at, f"digest {index}".encode(), index) for index, at in enumerate(ids)]


def key(index: int) -> str:
    return store_key(f"digest {index}".encode(), "t0p0")


def test_what_is_saved_is_loaded_into_other_blocks(raw: Worker) -> None:
    source, target = range(11), range(23, 12, -1)
    before = raw.contents(source)
    raw.transfer.save(blocks(source))
    raw.transfer.flush()
    for cache in raw.caches:
        cache[:11] = 0
    assert raw.load(blocks(target)) == set()
    assert torch.equal(raw.contents(target), before)
    assert raw.contents([11, 12]).any(), "others are left alone"
    counted = raw.counters.take()
    assert counted["saved_blocks"] == counted["loaded_blocks"] == 11
    assert counted["saved_raw_bytes"] == 11 * BLOCK_BYTES
    assert (
        counted["saved_bytes"]
        == counted["loaded_bytes"]
        == sum(map(len, raw.store.values.values()))
    )
    assert counted.keys() <= COUNTERS.keys()
    assert raw.transfer.unsaved() == set()


def test_compressed_blocks_come_close() -> None:
    worker = Worker(E8Codec(8))
    before = worker.contents([3, 4])
    worker.transfer.save(blocks([3, 4]))
    worker.transfer.flush()
    assert worker.load(blocks([7, 8])) == set()
    after = worker.contents([7, 8])
    assert (after - before).norm() < 0.02 * before.norm()
    counted = worker.counters.take()
    assert counted["saved_bytes"] < counted["saved_raw_bytes"]
    worker.transfer.close()


def test_blocks_may_be_used_again_at_once(raw: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    go, put = threading.Event(), raw.store.put
    monkeypatch.setattr(raw.store, "put", lambda *given: (go.wait(30), put(*given)))
    before = raw.contents([1, 2])
    raw.transfer.save(blocks([1, 2]))
    for cache in raw.caches:
        cache.zero_()
    go.set()
    raw.transfer.flush()
    assert raw.load(blocks([5, 6])) == set()
    assert torch.equal(raw.contents([5, 6]), before)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "moved"])
def test_blocks_from_the_first_that_cannot_be_had_fail(raw: Worker, damage: str) -> None:
    raw.transfer.save(blocks(range(4)))
    raw.transfer.flush()
    values = raw.store.values
    match damage:
        case "missing":
            del values[key(2)]
        case "flipped":
            values[key(2)] = values[key(2)][:-1] + bytes([values[key(2)][-1] ^ 1])
        case "cut":
            values[key(2)] = values[key(2)][:-9]
        case "moved":
            values[key(2)] = values[key(1)]
    before = raw.contents([22, 23])
    assert raw.load(blocks([20, 21, 22, 23])) == {22, 23}
    assert torch.equal(raw.contents([22, 23]), before), "nothing was written"
    assert torch.equal(raw.contents([20, 21]), raw.contents([0, 1]))
    counted = raw.counters.take()
    assert (counted["loaded_blocks"], counted["failed_blocks"]) == (2, 2)
    assert counted.get("damaged_blocks", 0) == (damage != "missing")
    raw.transfer.save(blocks(range(4)))
    raw.transfer.flush()
    assert raw.counters.take()["saved_blocks"] == 1, "the others are there"
    assert raw.load(blocks([20, 21, 22, 23])) == set()
    assert torch.equal(raw.contents([22, 23]), raw.contents([2, 3]))


def test_a_store_that_is_down_fails_and_unsaves(raw: Worker) -> None:
    raw.transfer.save(blocks([0, 1]))
    raw.transfer.flush()
    raw.store.down = True
    assert raw.load(blocks([5, 6])) == {5, 6}
    raw.transfer.save(blocks([2, 3]))
    raw.transfer.flush()
    assert raw.transfer.unsaved() == {b"digest 0", b"digest 1"}
    assert raw.transfer.unsaved() == set()


class Broken(RawCodec):
    """A codec with a bug, behind its first use."""

    def __init__(self) -> None:
        self.uses = 0

    def decode(self, *given: Any) -> Any:
        self.uses += 1
        if self.uses > 1:
            raise IndexError("a bug")
        return super().decode(*given)

    def encode(self, keys: Layers, values: Layers, first_position: int) -> bytes:
        if first_position == TOKENS:
            raise IndexError("a bug")
        return super().encode(keys, values, first_position)


def test_bugs_are_recomputed_and_shown_too(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Broken())
    worker.transfer.save(blocks([0, 1]))
    worker.transfer.flush()
    assert list(worker.store.values) == [key(0)]
    assert worker.load(blocks([5])) == {5}
    assert caplog.text.count("IndexError: a bug") == 2
    worker.transfer.close()


@pytest.mark.parametrize("method", ["contains_many", "put"])
def test_all_that_a_failure_left_out_is_unsaved(
    raw: Worker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    right, calls = getattr(raw.store, method), 0

    def fails(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if method == "contains_many" or calls == 3:
            raise RuntimeError("a bug of a client library")
        return right(*given)

    monkeypatch.setattr(raw.store, method, fails)
    raw.transfer.save(blocks(range(5)))
    raw.transfer.flush()
    saved = {"contains_many": 0, "put": 2}[method]
    assert raw.transfer.unsaved() == {f"digest {index}".encode() for index in range(saved, 5)}
    counted = raw.counters.take()
    assert (counted.get("saved_blocks", 0), counted["unsaved_blocks"]) == (saved, 5 - saved)


def test_nan_is_not_stored() -> None:
    worker = Worker(E8Codec())
    worker.caches[1][4, 0, 0, 0] = torch.nan
    worker.transfer.save(blocks([3, 4]))
    worker.transfer.flush()
    assert list(worker.store.values) == [key(0)]
    assert worker.transfer.unsaved() == set(), "it would be NaN again"
    worker.transfer.close()


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(RawCodec(), queue_bytes=2 * BLOCK_BYTES)
    go, put = threading.Event(), worker.store.put
    monkeypatch.setattr(worker.store, "put", lambda *given: (go.wait(30), put(*given)))
    saving = threading.Thread(target=worker.transfer.save, args=[blocks(range(6))])
    saving.start()
    saving.join(0.2)
    assert saving.is_alive(), "the model waits"
    go.set()
    saving.join(30)
    worker.transfer.flush()
    assert len(worker.store.values) == 6
    worker.transfer.close()


def test_closing_finishes_saves() -> None:
    worker = Worker(RawCodec())
    worker.transfer.save(blocks(range(20)))
    worker.transfer.close()
    assert len(worker.store.values) == 20


def test_a_block_counts_if_the_parts_of_all_ranks_are_there() -> None:
    store, counters = Memory(), Counters()
    lookup = Lookup(Guard(lambda: store, counters, LOGGER), ["t0p0", "t1p0"], counters, LOGGER)
    digests = [bytes([index]) * 32 for index in range(200)]
    for digest in digests[:150]:
        for suffix in ("t0p0", "t1p0"):
            store.put(store_key(digest, suffix), b"x")
    assert lookup.start(digests).result() == 150
    store.delete(store_key(digests[7], "t1p0"))
    assert lookup.start(digests).result() == 7
    assert lookup.start([]).result() == 0
    assert counters.take() == {"lookups": 3, "looked_up_blocks": 400, "found_blocks": 157}
    store.down = True
    assert lookup.start(digests).result() == 0
    lookup.close()


def test_a_lookup_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    def open_store() -> Any:
        raise RuntimeError("a bug")

    counters = Counters()
    lookup = Lookup(Guard(open_store, counters, LOGGER), ["t0p0"], counters, LOGGER)
    assert lookup.start([b"digest"]).result() == 0
    assert "RuntimeError: a bug" in caplog.text
    lookup.close()
