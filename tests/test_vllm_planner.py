"""The scheduler's bookkeeping: what is loaded and saved when, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from nexusquant.vllm.planner import Block, Planner, Scheduled
from tests.vllm_cases import Clock

SIZE = 4


class Asked:
    """A store's lookup: which digests there are, and whether it answers yet."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.calls: list[list[bytes]] = []
        self.waiting: list[tuple[Future[int], int]] = []
        self.slow = False

    def __call__(self, digests: Sequence[bytes]) -> Future[int]:
        self.calls.append(list(digests))
        count = next((i for i, d in enumerate(digests) if d not in self.stored), len(digests))
        answer: Future[int] = Future()
        self.waiting.append((answer, count))
        if not self.slow:
            self.answer()
        return answer

    def answer(self) -> None:
        for answer, count in self.waiting:
            answer.set_result(count)
        self.waiting = []


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def planner(asked: Asked, clock: Clock, **options: Any) -> Planner:
    settings = {"loads": True, "saves": True, "flush": False}
    return Planner(
        SIZE, asked, lookup_seconds=0.0, retry_seconds=10.0, clock=clock, **settings | options
    )


def digests(tokens: int, name: str = "d") -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(tokens // SIZE)]


def new(request: str, blocks: Sequence[int], computed: int, tokens: int) -> Scheduled:
    return Scheduled(request, blocks, True, computed, tokens)


def more(request: str, blocks: Sequence[int], computed: int, tokens: int) -> Scheduled:
    return Scheduled(request, blocks, False, computed, tokens)


def saved(plan: Planner, *scheduled: Scheduled) -> list[tuple[int, bytes]]:
    return [(block.id, block.digest) for block in plan.step(scheduled).saves]


def test_one_token_at_least_is_left_to_compute(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(100))
    plan = planner(asked, clock)
    for tokens, expected in ((3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12), (17, 16)):
        plan.add(f"r{tokens}", digests(tokens), tokens)
        assert plan.matched(f"r{tokens}", 0) == expected


def test_the_store_counts_beyond_what_vllm_has(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    asked.stored = set(digests(16)[:3])
    plan.add("r", digests(20), 20)
    assert plan.matched("r", 8) == 4
    assert asked.calls == [digests(16)[2:]]
    assert plan.matched("r", 12) == 0, "answered from the same question"
    assert plan.matched("r", 16) == 0
    assert len(asked.calls) == 1
    assert plan.matched("r", 4) == 8, "vLLM has fewer now: asked again"
    assert len(asked.calls) == 2


def test_a_slow_store_is_asked_once_and_waited_for(asked: Asked, clock: Clock) -> None:
    asked.slow, asked.stored = True, set(digests(8))
    plan = planner(asked, clock)
    plan.add("r", digests(20), 20)
    assert [plan.matched("r", 0) for _ in range(3)] == [None] * 3
    asked.answer()
    assert plan.matched("r", 0) == 8
    assert len(asked.calls) == 1


def test_loads_are_of_the_step_after_blocks_are_there(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(12))
    plan = planner(asked, clock)
    plan.add("r", digests(20), 20)
    assert plan.matched("r", 4) == 8
    plan.allocated("r", [7, 8, 9], 8)
    step = plan.step([])
    assert step.idle
    assert [load.request for load in step.loads] == ["r"]
    assert step.loads[0].blocks == [Block(8, b"d1", 1), Block(9, b"d2", 2)]
    assert plan.step([]).loads == []
    plan.loaded(["r"], [])
    plan.allocated("r", [7, 8, 9, 10, 11], 0)
    assert saved(plan, new("r", [7, 8, 9, 10, 11], 12, 8)) == [(7, b"d0"), (10, b"d3"), (11, b"d4")]


def test_prefill_in_chunks_saves_what_is_full(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("r", digests(19), 19)
    assert saved(plan, new("r", [1, 2], 0, 6)) == [(1, b"d0")]
    assert saved(plan, more("r", [3], 6, 1)) == []
    assert saved(plan, more("r", [4, 5], 7, 9)) == [(2, b"d1"), (3, b"d2"), (4, b"d3")]
    assert saved(plan, more("r", [], 16, 3)) == []
    assert saved(plan, more("r", [6], 19, 1)) == [], "generated tokens are not"


def test_nothing_is_saved_twice(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("a", digests(9), 9)
    plan.add("b", digests(13), 13)
    assert len(saved(plan, new("a", [1, 2, 3], 0, 9))) == 2
    assert saved(plan, new("b", [1, 2, 4, 5], 8, 5)) == [(4, b"d2")]
    plan.unsaved([b"d1"])
    plan.add("c", digests(9), 9)
    assert saved(plan, new("c", [1, 2, 6], 8, 1)) == [(2, b"d1")]


def test_what_the_store_lost_is_saved_again(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("a", digests(9), 9)
    saved(plan, new("a", [1, 2, 3], 0, 9))
    plan.add("b", digests(9), 9)
    assert plan.matched("b", 0) == 0
    assert saved(plan, new("b", [4, 5, 6], 0, 9)) == [(4, b"d0"), (5, b"d1")]


def test_what_may_be_gone_is_looked_after(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock, loads=False)
    for request, later, expected in (("a", 0, 2), ("b", 59, 0), ("c", 1, 2), ("d", 59, 0)):
        clock.now += later
        plan.add(request, digests(9), 9)
        assert len(saved(plan, new(request, [1, 2, 3], 0, 9))) == expected


def test_a_last_block_that_was_not_asked_for_stays_known(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("a", digests(8), 8)
    saved(plan, new("a", [1, 2], 0, 8))
    asked.stored = set(digests(8))
    plan.add("b", digests(8), 8)
    assert plan.matched("b", 0) == 4
    assert saved(plan, new("b", [3, 4], 4, 4)) == []


def test_failed_blocks_are_computed_and_saved_anew(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(16))
    plan = planner(asked, clock)
    plan.add("r", digests(17), 17)
    assert plan.matched("r", 0) == 16
    plan.allocated("r", [1, 2, 3, 4, 5], 16)
    plan.step([])
    plan.loaded(["r"], [3, 4])
    blocks = [1, 2, 3, 4, 5]
    assert saved(plan, new("r", blocks, 8, 9)) == [(3, b"d2"), (4, b"d3")]
    plan.add("s", digests(17), 17)
    assert plan.matched("s", 0) == 16, "they are good again"


def test_a_first_block_that_fails_is_not_asked_for_again(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(16))
    plan = planner(asked, clock)
    plan.add("r", digests(17), 17)
    plan.matched("r", 0)
    plan.allocated("r", [1, 2, 3, 4, 5], 16)
    plan.step([])
    plan.loaded(["r"], [1, 2, 3, 4])
    clock.now += 100
    assert plan.matched("r", 0) == 0, "by this request, ever"
    plan.finished("r")
    assert not plan.knows("r")


def test_bad_blocks_are_asked_for_again_after_a_while(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(16))
    plan = planner(asked, clock, saves=False)
    plan.add("r", digests(17), 17)
    plan.matched("r", 0)
    plan.allocated("r", [1, 2, 3, 4, 5], 16)
    plan.loaded(["r"], [3])
    for request, later, expected in (("s", 0, 8), ("t", 9, 8), ("u", 2, 16)):
        clock.now += later
        plan.add(request, digests(17), 17)
        assert plan.matched(request, 0) == expected


def test_a_preempted_request_starts_with_new_blocks(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("r", digests(17), 17)
    saved(plan, new("r", [1, 2, 3], 0, 10))
    asked.stored = set(digests(8))
    assert plan.matched("r", 0) == 8
    plan.allocated("r", [5, 6], 8)
    assert plan.step([]).loads[0].blocks == [Block(5, b"d0", 0), Block(6, b"d1", 1)]
    plan.loaded(["r"], [6])
    resumed = Scheduled("r", [5, 6, 7, 8, 9], True, 4, 13)
    assert saved(plan, resumed) == [(6, b"d1"), (7, b"d2"), (8, b"d3")]


def test_roles(asked: Asked, clock: Clock) -> None:
    asked.stored = set(digests(16))
    producer = planner(asked, clock, loads=False, flush=True)
    producer.add("r", digests(17), 17)
    assert producer.matched("r", 0) == 0
    assert asked.calls == []
    first, last = producer.step([new("r", [1, 2], 0, 8)]), producer.step([more("r", [3, 4], 8, 9)])
    assert (first.flush, last.flush) == (False, True)
    assert len(first.saves) + len(last.saves) == 4
    assert not producer.step([more("r", [5], 17, 1)]).flush
    consumer = planner(asked, clock, saves=False)
    consumer.add("r", digests(17), 17)
    assert consumer.matched("r", 0) == 16
    assert consumer.step([new("r", [1, 2, 3, 4, 5], 16, 1)]).saves == []


def test_requests_without_digests_and_unknown_ones(asked: Asked, clock: Clock) -> None:
    plan = planner(asked, clock)
    plan.add("lora", [], 40)
    assert plan.matched("lora", 0) == 0
    assert saved(plan, new("lora", [1, 2], 0, 8), new("never seen", [3], 0, 4)) == []
    plan.finished("never seen")
    plan.loaded(["never seen"], [9])
