"""What every store does, whatever it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import Store

HOSTILE = [
    "", ".", "..", ".hidden", "../up", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\n", "\n", "a b",
    "~", "*", "[a]", "?", "a?b=c", "%2e%2e", "ä", "①", "a" * 201, "CON:", "s3://x", "$(x)", "-;x",
    None, 1, b"bytes",
]  # fmt: skip
FRIENDLY = ["a", "A", "0", "-", "_", "a.", "a..b", "--help", "a" * 200, "x" * 100 + ".nxq"]


def test_values_of_all_sizes_come_back(store: Store) -> None:
    rng = random.Random(0)
    values = {f"k{size}": rng.randbytes(size) for size in (0, 1, 2, 1000, 65_536, 3_000_001)}
    for key, value in values.items():
        store.put(key, value)
    assert {key: store.get(key) for key in values} == values
    assert [store.size(key) for key in values] == [len(value) for value in values.values()]
    assert sorted(store.keys()) == sorted(values)
    assert store.get_many([*values, "none"]) == [*values.values(), None]
    assert store.contains_many(["none", *values, "k0"]) == [False] + [True] * (len(values) + 1)


def test_what_is_not_there_is_a_miss(store: Store) -> None:
    assert store.get("none") is None
    assert store.get_range("none", 0, 5) is None
    assert store.get_range("none", 3, 3) is None
    assert store.size("none") is None
    assert not store.contains("none")
    assert store.get_many([]) == store.contains_many([]) == list(store.keys()) == []
    store.delete("none")


def test_ranges_are_those_of_a_slice(store: Store) -> None:
    value = bytes(range(256)) * 4
    store.put("v", value)
    store.put("empty", b"")
    for start in (0, 1, 255, 1023, 1024, 1025, 5000):
        for length in (0, 1, 2, 700, 5000):
            assert store.get_range("v", start, start + length) == value[start : start + length]
            assert store.get_range("empty", start, start + length) == b""
    wrong: list[tuple[Any, Any]] = [(-1, 3), (4, 3), (-5, -1), ("0", 2), (0, 1.5), (None, 3)]
    for start, stop in wrong:
        with pytest.raises(ConfigError, match="start <= stop"):
            store.get_range("v", start, stop)


def test_a_value_replaces_the_one_before(store: Store) -> None:
    for value in (b"one", b"", b"a longer one", b"two"):
        store.put("key", value)
        assert store.get("key") == value
        assert store.size("key") == len(value)
    assert list(store.keys()) == ["key"]
    store.delete("key")
    assert store.get("key") is None
    assert not store.contains("key")


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"-abc")[1:], b"abc"])
def test_values_are_whatever_is_bytes(store: Store, value: bytes) -> None:
    store.put("key", value)
    assert store.get("key") == b"abc"


@pytest.mark.parametrize("value", ["text", None, 3, memoryview(b"abcd")[::2]])
def test_nothing_else_is_a_value(store: Store, value: bytes) -> None:
    with pytest.raises(ConfigError, match="contiguous bytes"):
        store.put("key", value)
    assert list(store.keys()) == []


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys_are_refused_by_everything(store: Store, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.get_many(["a", key]),
        lambda: store.size(key),
        lambda: store.contains(key),
        lambda: store.contains_many(["a", key]),
        lambda: store.put(key, b""),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="not a key"):
            call()


@pytest.mark.parametrize("keys", [None, 5, "key"])
def test_what_is_no_list_of_keys(store: Store, keys: Any) -> None:
    for ask in (store.get_many, store.contains_many):
        with pytest.raises(ConfigError, match="no list of keys"):
            ask(keys)


def test_friendly_keys_are_all_different(store: Store) -> None:
    for key in FRIENDLY:
        store.put(key, key.encode())
    assert store.get_many(FRIENDLY) == [key.encode() for key in FRIENDLY]
    assert sorted(store.keys()) == sorted(FRIENDLY)


def test_a_closed_store_says_so(fresh: Callable[[], Store]) -> None:
    with fresh() as store:
        store.put("key", b"value")
    store.close()  # again
    calls = [lambda: store.get("key"), lambda: store.put("key", b""), lambda: store.keys()]
    for call in calls:
        with pytest.raises(StoreError, match="closed"):
            call()


_KEYS = st.sampled_from(["a", "b", "A", "a.b", "-"])
_STEPS = st.one_of(
    st.tuples(st.just("put"), _KEYS, st.binary(max_size=300)),
    st.tuples(st.just("delete"), _KEYS, st.none()),
    st.tuples(st.just("range"), _KEYS, st.tuples(st.integers(0, 400), st.integers(0, 400))),
)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(_STEPS, max_size=25))
def test_a_store_is_a_dict(
    fresh: Callable[[], Store], steps: list[tuple[str, str, object]]
) -> None:
    store, model = fresh(), dict[str, bytes]()
    for what, key, argument in steps:
        if what == "put":
            assert isinstance(argument, bytes)
            store.put(key, argument)
            model[key] = argument
        elif what == "delete":
            store.delete(key)
            model.pop(key, None)
        else:
            start, stop = sorted(argument)
            expected = model[key][start:stop] if key in model else None
            assert store.get_range(key, start, stop) == expected
        assert store.get(key) == model.get(key)
        assert store.size(key) == (len(model[key]) if key in model else None)
    keys = ["-", "a.b", "A", "b", "a"]
    assert store.get_many(keys) == [model.get(key) for key in keys]
    assert store.contains_many(keys) == [key in model for key in keys]
    assert sorted(store.keys()) == sorted(model)
