"""Lattice points of a page to bytes and back: a range coder with models from the profile.

The coset bits come first. Then, given them, the integers n but for the first of every group; then
those, of which the others have told the parity (their sum is even). That reaches the joint entropy
of independent coordinates; to code doubled coordinates one by one would cost 1 bit each more.

Every number has a class: its deviation over the step, in thirds of an octave, known to both sides
from the profile. All numbers of a class are coded in a row with one table. Classes above the last
one drop bits until they fit; the dropped bits are coded as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexusquant.errors import FormatError, NonFiniteError
from nexusquant.extras import need

CLASSES = 16
"""Deviations of 2^-3 to 2^2 steps, and what is below."""
OCTAVE = 3  # classes
REACH = 40
"""n of -40 to 39 have a symbol of their own; the last symbol announces one that has not."""
SYMBOLS = 2 * REACH + 1
UNKNOWN = 2
"""For a parity that is not known."""
_DRAW = 12  # bits of numbers without a symbol that are coded at a time, twice
_DRAWN = 1 << _DRAW
_WIDE = 1 << (2 * _DRAW - 1)

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Tables:
    """Counts that probabilities come from: plain integers, so that every machine has the same.

    Attributes:
        values: (sides, CLASSES, cosets, SYMBOLS) uint16, at least 1.
        cosets: (sides, CLASSES, 2) uint16, at least 1.
    """

    values: NDArray[np.uint16]
    cosets: NDArray[np.uint16]
    _models: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def value(self, side: int, cls: int, coset: int, parity: int) -> Any:
        """Model of n + REACH; of (n - parity + REACH) / 2 where the parity 0 or 1 is known."""
        key = (side * CLASSES + cls) * 2 + coset, parity, 0
        if key not in self._models:
            counts = self.values[side, cls, coset]
            if parity != UNKNOWN:
                counts = np.append(counts[parity:-1:2], counts[-1])
            self._models[key] = _model(counts)
        return self._models[key]

    def coset(self, side: int, cls: int) -> Any:
        """Model of the coset bit."""
        key = side * CLASSES + cls, 0, 1
        if key not in self._models:
            self._models[key] = _model(self.cosets[side, cls])
        return self._models[key]


def _model(counts: NDArray[np.uint16]) -> Any:
    share = counts.astype(np.float64) / counts.sum(dtype=np.float64)
    return need("constriction").stream.model.Categorical(share.astype(np.float32), perfect=False)


@dataclass(frozen=True)
class Classes:
    """What both sides know of a page before any of its bytes, coded groups only.

    Attributes:
        side: (groups,) 0 for keys, 1 for values.
        coset: (tokens, groups) int16, classes of the coset bits.
        value: (tokens, groups, 8) int16, classes of the numbers.
        drop: (tokens, groups, 8) int16, bits coded as they are.
    """

    side: NDArray[np.int16]
    coset: NDArray[np.int16]
    value: NDArray[np.int16]
    drop: NDArray[np.int16]


def classify(level: NDArray[Any]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Class and dropped bits of deviations given as 12 log2(deviation / step)."""
    cls = np.maximum((level + 38) // 4, 0)
    drop = np.maximum(-((CLASSES - 1 - cls) // OCTAVE), 0)
    return (cls - OCTAVE * drop).astype(np.int16), drop.astype(np.int16)


class _Encoder:
    """The direction in which symbols are known."""

    def __init__(self) -> None:
        self.coder = need("constriction").stream.queue.RangeEncoder()

    def code(self, symbols: Ints, model: Any) -> Ints:
        self.coder.encode(symbols, model)
        return symbols


class _Decoder:
    """The direction in which symbols are found out."""

    def __init__(self, data: bytes | memoryview) -> None:
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        self.coder = need("constriction").stream.queue.RangeDecoder(words)

    def code(self, symbols: Ints, model: Any) -> Ints:
        found: Ints = self.coder.decode(model, len(symbols))
        return found


def encode(n: Ints, coset: Ints, classes: Classes, tables: Tables) -> bytes:
    """A page's points, n (tokens, groups, 8) and coset (tokens, groups), to bytes.

    Raises:
        NonFiniteError: a number of 2^23 steps or more.
    """
    if n.size and int(np.abs(n).max()) >= _WIDE:
        raise NonFiniteError(f"a vector is {int(np.abs(n).max())} steps long: too many to code.")
    coder = _Encoder()
    _page(coder, n.copy(), coset.copy(), classes, tables)
    return bytes(coder.coder.get_compressed().astype("<u4").tobytes())


def decode(data: bytes | memoryview, classes: Classes, tables: Tables) -> tuple[Ints, Ints]:
    """Inverse of `encode`.

    Raises:
        FormatError: bytes that nothing can have been coded to.
    """
    if len(data) % 4:
        raise FormatError(f"a page of {len(data)} bytes, which is no multiple of 4: damaged.")
    n = np.zeros(classes.value.shape, np.int32)
    coset = np.zeros(classes.coset.shape, np.int32)
    try:
        _page(_Decoder(data), n, coset, classes, tables)
    # What constriction raises for data that the models cannot have made.
    except (AssertionError, ValueError) as error:
        raise FormatError(f"a page that cannot be decoded ({error}): damaged.") from error
    return n, coset


def _page(
    coder: _Encoder | _Decoder, n: Ints, coset: Ints, classes: Classes, tables: Tables
) -> None:
    """Code a page; where symbols are found out, they are written into n and coset."""
    side = classes.side.astype(np.int32)
    flat = coset.reshape(-1)
    for key, at in _runs((side * CLASSES + classes.coset).reshape(-1)):
        flat[at] = coder.code(flat[at], tables.coset(*divmod(key, CLASSES)))
    where = ((side[:, None] * CLASSES + classes.value) * 2 + coset[..., None]) * 3
    unknown = np.broadcast_to(np.int32(UNKNOWN), n[..., 1:].shape)
    n[..., 1:] = _numbers(coder, n[..., 1:], where[..., 1:], classes.drop[..., 1:], unknown, tables)
    parity = n[..., 1:].sum(-1, dtype=np.int32) & 1
    n[..., 0] = _numbers(coder, n[..., 0], where[..., 0], classes.drop[..., 0], parity, tables)


def _numbers(
    coder: _Encoder | _Decoder,
    n: Ints,
    where: Ints,
    drop: NDArray[np.int16],
    parity: Ints,
    tables: Tables,
) -> Ints:
    """Code numbers whose lowest bit is `parity` where that is known; returns them."""
    shape = n.shape
    n, drop, parity = n.reshape(-1), drop.reshape(-1).astype(np.int32), parity.reshape(-1)
    known = np.where(drop == 0, parity, UNKNOWN)
    halved = known != UNKNOWN
    offset, top = REACH - np.where(halved, known, 0), np.where(halved, REACH, 2 * REACH)
    symbol = ((n >> drop) + offset) >> halved
    symbol = np.where((symbol < 0) | (symbol >= top), top, symbol).astype(np.int32)
    for key, at in _runs(where.reshape(-1) + known):
        cls, is_known = divmod(key, 3)
        side_class, coset = divmod(cls, 2)
        model = tables.value(*divmod(side_class, CLASSES), coset, is_known)
        symbol[at] = coder.code(symbol[at], model)
    high = (symbol << halved) - offset
    (far,) = (symbol == top).nonzero()
    if len(far):
        folded = _fold((n >> drop)[far])
        low = coder.code(folded & (_DRAWN - 1), _uniform(_DRAWN))
        high[far] = _unfold(low | (coder.code(folded >> _DRAW, _uniform(_DRAWN)) << _DRAW))
    found = high << drop
    for bits in np.unique(drop[drop > 0]):
        (at,) = (drop == bits).nonzero()
        told = (parity[at] != UNKNOWN).astype(np.int32)  # one of the bits, of all or of none
        size = 1 << int(bits - told[0])
        dropped = (n[at] >> told) & (size - 1)
        if size > 1:
            dropped = coder.code(dropped, _uniform(size))
        found[at] |= (dropped << told) | np.where(told, parity[at], 0)
    return found.reshape(shape)


def _fold(x: Ints) -> Ints:
    """Signed to unsigned: 0, -1, 1, -2, ..."""
    return (x << 1) ^ (x >> 31)


def _unfold(x: Ints) -> Ints:
    return (x >> 1) ^ -(x & 1)


def _runs(key: NDArray[Any]) -> list[tuple[int, NDArray[np.int64]]]:
    """Every key that there is, ascending, and where."""
    order = np.argsort(key.astype(np.int16), kind="stable")  # a radix sort
    counts = np.bincount(key)
    ends = counts.cumsum()
    return [(int(k), order[ends[k] - counts[k] : ends[k]]) for k in counts.nonzero()[0]]


@lru_cache(maxsize=32)
def _uniform(size: int) -> Any:
    return need("constriction").stream.model.Uniform(size)
