"""Points to bytes and back, exactly; and what is not points to FormatError."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexusquant.entropy import symbols
from nexusquant.entropy.classes import CLASSES, KEYS, UNKNOWN, Classes, order, parts
from nexusquant.entropy.symbols import REACH, SYMBOLS, Tables, decode, encode
from nexusquant.errors import FormatError, NonFiniteError
from nexusquant.kernels import use_operator
from tests.entropy.cases import classes_of, points_of, profile

LARGEST = (1 << 23) - 2
Points = tuple[NDArray[np.int32], NDArray[np.int32]]
TABLES = profile().tables


def assert_same(points: Points, classes: Classes) -> bytes:
    before = [x.copy() for x in points]
    data = encode(*points, classes, TABLES)
    found = decode(data, classes, TABLES)
    for x, y, z in zip(points, found, before, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)  # the caller's are left alone
    assert len(data) % 4 == 0
    return data


@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 4), st.integers(0, 4),
    st.sampled_from([2, 30, 300, 1 << 14, LARGEST]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_points_come_back(seed: int, tokens: int, keys: int, values: int, largest: int) -> None:
    classes = classes_of(seed, tokens, (keys, values))
    assert_same(points_of(seed, classes.shape, largest), classes)


@pytest.mark.parametrize("level", [-(2**15), -39, -38, 0, 21, 22, 25, 26, 200, 238, 300, 2**15])
@pytest.mark.parametrize("value", [-LARGEST, -REACH - 1, -REACH, -1, 0, REACH - 1, REACH, LARGEST])
def test_every_level_takes_every_number(level: int, value: int, each_operator: str) -> None:
    classes = Classes(
        np.array([0, 1], np.int32), np.full((2, 2), level, np.int32),
        np.full((2, 2, 8), level, np.int32), np.array([0, 5, -7], np.int32),
    )  # fmt: skip
    n = np.zeros((3, 2, 8), np.int32)
    n[:, :, 3], n[:, 0, 0] = value, value  # in the first place, and with one of either parity
    n[:, 1, 0] = value & 1
    assert_same((n, np.array([[0, 1], [1, 0], [1, 1]], np.int32)), classes)


def test_all_classes_are_met() -> None:
    classes = classes_of(3, 40, (2, 2))
    _, coset = points_of(3, classes.shape, 10)
    found = parts(classes.number_keys(coset, coset * 0 + UNKNOWN, 0, 8).astype(np.int32))
    assert set(found.cls.tolist()) == set(range(CLASSES))
    assert found.drop.max() >= 15
    assert set(found.side.tolist()) == set(found.coset.tolist()) == {0, 1}
    assert (found.cls[found.drop > 0] > CLASSES - 4).all()


def test_no_groups_and_no_tokens_take_no_bytes() -> None:
    for classes in (classes_of(0, 5, (0, 0)), classes_of(0, 0, (1, 2))):
        assert assert_same(points_of(0, classes.shape, 9), classes) == b""


def test_keys_and_their_order_are_the_definitions() -> None:
    pytest.importorskip("numba")
    classes = classes_of(5, 33, (2, 3))
    n, coset = points_of(5, classes.shape, 50)
    found = []
    for name in ("numba", "reference"):
        before = use_operator(name)
        parity = n.sum(-1, dtype=np.int32) & 1
        keys = [classes.number_keys(coset, parity, 0, 1), classes.number_keys(coset, parity, 1, 8)]
        orders = [x for key in keys for x in order(key, KEYS)]
        found.append([classes.coset_keys(), *keys, *orders, np.frombuffer(
            encode(n, coset, classes, TABLES), np.uint8)])  # fmt: skip
        use_operator(before)
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_deviations_of_a_class_are_within_a_third_of_an_octave() -> None:
    level = np.arange(-38, 22, dtype=np.int32).reshape(1, -1, 1).repeat(2, 0)
    level = level[..., None].repeat(8, 2)[..., 0]
    classes = Classes(np.zeros(60, np.int32), level[..., 0], level, np.zeros(1, np.int32))
    none = np.zeros((1, 60), np.int32)
    found = parts(classes.number_keys(none, none, 0, 1).astype(np.int32))
    assert found.cls.tolist() == [i // 4 for i in range(60)]
    assert not found.drop.any()
    assert found.known.tolist() == [0] * 60


def test_likely_points_take_few_bytes() -> None:
    classes = classes_of(1, 200, (3, 3), span=-20)
    n, coset = points_of(1, classes.shape, 2)
    nothing = encode(n * 0, coset * 0, classes, TABLES)
    assert len(nothing) * 8 < 0.1 * n.size
    assert len(encode(n, coset, classes, TABLES)) > 5 * len(nothing)


def test_a_known_parity_saves_a_bit() -> None:
    """The first number of a group is coded given that the sum is even, the others are not."""
    level = np.full((2, 50, 8), 21, np.int32)
    classes = Classes(np.zeros(50, np.int32), level[..., 0], level, np.zeros(100, np.int32))
    coset, n = np.zeros(classes.shape, np.int32), np.zeros((2, 100, 50, 8), np.int32)
    n[0, ..., 0] = n[1, ..., 1] = 2 * np.random.default_rng(0).integers(-4, 5, classes.shape)
    first, second = (8 * len(encode(x, coset, classes, TABLES)) / coset.size for x in n)
    zero = 8 * len(encode(n[0] * 0, coset, classes, TABLES)) / coset.size
    assert first - zero == pytest.approx(second - zero, abs=0.1)  # zeros save the bit, too
    told, free = (TABLES.values[0, 15, 0][part] / 65536 for part in (slice(0, 80, 2), slice(80)))
    assert -np.log2(told / told.sum()).min() < -np.log2(free).min() - 0.8


def test_numbers_of_2_to_the_23_are_refused() -> None:
    classes = classes_of(0, 2, (1, 0))
    for value in (LARGEST + 2, -LARGEST - 2, -(2**31), 2**31 - 2):
        n = np.zeros((2, 1, 8), np.int32)
        n[1, 0, 0] = value
        with pytest.raises(NonFiniteError, match="steps"):
            encode(n, np.zeros((2, 1), np.int32), classes, TABLES)


def take(data: bytes, classes: Classes) -> bool:
    """Whether bytes decode; anything but FormatError would pass through."""
    try:
        n, coset = decode(data, classes, TABLES)
    except FormatError:
        return False
    assert n.shape == (*classes.shape, 8)
    assert coset.shape == classes.shape
    assert set(np.unique(coset)) <= {0, 1}
    return True


def test_random_bytes_decode_or_are_refused() -> None:
    source = random.Random(0)
    kinds = [classes_of(i, 3 + i, (i % 3, 1)) for i in range(6)]
    taken = sum(
        take(source.randbytes(source.randrange(0, 60)), source.choice(kinds)) for _ in range(10_000)
    )
    assert 0 < taken < 10_000


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 1000])
def test_damaged_pages_decode_or_are_refused(length: int) -> None:
    classes = classes_of(9, 60, (2, 2))
    data = encode(*points_of(9, classes.shape, 500), classes, TABLES)
    for bad in (data[:length], data[length:], data + b"\xff" * length, b"\xff" * length):
        took = take(bad, classes)
        assert not (took and len(bad) % 4)
    for at in range(0, len(data), 11):
        take(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :], classes)


def test_views_of_bytes_decode() -> None:
    classes = classes_of(4, 8, (1, 1))
    points = points_of(4, classes.shape, 50)
    data = encode(*points, classes, TABLES)
    at = memoryview(b"x" + data)[1:]  # not even aligned
    np.testing.assert_array_equal(decode(at, classes, TABLES)[0], points[0])


def test_bytes_are_those_of_every_machine(each_operator: str) -> None:
    """Nothing here is from a generator or a float: what is stored must be read for years."""
    at = np.arange(SYMBOLS)
    values = (1 + 60000 // (4 + (at - REACH) ** 2)).astype(np.uint16)
    cosets = np.array([40000, 20000], np.uint16)
    tables = Tables(
        np.tile(values, (2, CLASSES, 2, 1)) + np.arange(CLASSES, dtype=np.uint16)[:, None, None],
        np.tile(cosets, (2, CLASSES, 1)),
    )
    count = np.arange(3 * 4 * 8, dtype=np.int32).reshape(3, 4, 8)
    n = (count * 7919 % 101 - 50) * (1 + 900 * (count % 13 == 0)).astype(np.int32)
    n[..., 0] -= n.sum(-1) & 1
    classes = Classes(
        np.array([0, 0, 1, 1], np.int32), np.arange(8, dtype=np.int32).reshape(2, 4) * 9 - 40,
        np.arange(64, dtype=np.int32).reshape(2, 4, 8) * 2 - 38, np.array([0, 6, -24], np.int32),
    )  # fmt: skip
    coset = (count[..., 0] // 8 % 3 == 0).astype(np.int32)
    data = encode(n, coset, classes, tables)
    assert hashlib.blake2b(data, digest_size=8).hexdigest() == "53d7f75b96b7189c"
    np.testing.assert_array_equal(decode(data, classes, tables)[0], n)


def test_models_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = classes_of(4, 8, (1, 1))
    points = points_of(4, classes.shape, 50)
    expected = encode(*points, classes, TABLES)
    monkeypatch.setattr(symbols, "_model", None)
    assert encode(*points, classes, TABLES) == expected
