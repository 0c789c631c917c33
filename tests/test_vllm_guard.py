"""A store that fails is a miss, and is left alone for a while."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import Store
from nexusquant.vllm.counters import Counters
from nexusquant.vllm.guard import Guard
from tests.vllm_cases import Clock, Memory


@pytest.fixture
def parts() -> tuple[Memory, Clock, Counters, Guard]:
    store, clock, counters = Memory(), Clock(), Counters()
    logger = logging.getLogger("test.guard")
    return store, clock, counters, Guard(lambda: store, counters, logger, 5.0, clock)


def test_answers_pass(parts: tuple[Memory, Clock, Counters, Guard]) -> None:
    _, _, counters, guard = parts
    assert guard.put("a", b"1")
    assert guard.contains_many(["a", "b"]) == [True, False]
    assert guard.get_many(["a", "b"]) == [b"1", None]
    assert not guard.resting()
    assert counters.take() == {}


def test_an_outage_costs_one_question_per_interval(
    parts: tuple[Memory, Clock, Counters, Guard], caplog: pytest.LogCaptureFixture
) -> None:
    store, clock, counters, guard = parts
    guard.put("a", b"1")
    store.down, store.asked = True, 0
    for _ in range(10):
        assert guard.contains_many(["a"]) == [False]
        assert guard.get_many(["a"]) == [None]
        assert not guard.put("b", b"2")
    assert store.asked == 1
    assert guard.resting()
    clock.now += 5
    assert not guard.resting()
    assert guard.get_many(["a"]) == [None]
    assert guard.get_many(["a"]) == [None]
    assert store.asked == 2
    store.down = False
    assert guard.get_many(["a"]) == [None], "not yet"
    clock.now += 5
    assert guard.get_many(["a"]) == [b"1"]
    assert guard.contains_many(["a"]) == [True]
    assert counters.take() == {"store_errors": 2}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "when it begins and when it ends"
    assert "memory: down" in said[0]


def test_one_caller_tries_after_the_interval(
    parts: tuple[Memory, Clock, Counters, Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock, _, guard = parts
    store.down = True
    guard.put("a", b"1")
    clock.now += 5
    seen: list[list[bytes | None]] = []

    def while_asking(keys: Sequence[str]) -> list[bytes | None]:
        store.asked += 1
        if store.asked == 2:
            seen.append(guard.get_many(keys))  # another caller, meanwhile
        raise StoreError("memory: down")

    monkeypatch.setattr(store, "get_many", while_asking)
    guard.get_many(["a"])
    assert seen == [[None]]
    assert store.asked == 2


def test_a_store_that_cannot_be_opened_is_opened_later() -> None:
    clock, store, tries = Clock(), Memory(), []

    def open_store() -> Store:
        tries.append(clock.now)
        if len(tries) < 2:
            raise StoreError("refused")
        return store

    guard = Guard(open_store, Counters(), logging.getLogger("test.guard"), 5.0, clock)
    assert not guard.put("a", b"1")
    clock.now += 5
    assert guard.put("a", b"1")
    assert guard.put("b", b"1")
    assert len(tries) == 2


def test_a_wrong_url_is_an_error() -> None:
    def open_store() -> Store:
        raise ConfigError("no such place")

    guard = Guard(open_store, Counters(), logging.getLogger("test.guard"))
    with pytest.raises(ConfigError):
        guard.contains_many([])
