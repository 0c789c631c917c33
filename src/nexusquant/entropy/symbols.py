"""Lattice points of a page to bytes and back: a range coder with models from the profile.

The coset bits come first. Then, given them, the integers n but for the first of every group; then
those, of which the others have told the parity (their sum is even). That reaches the joint entropy
of independent coordinates; to code doubled coordinates one by one would cost 1 bit each more.

Both sides know a key of every number (`nexusquant.entropy.classes`); all numbers of one key are
coded in a row with one table, keys ascending. Then numbers that have no symbol, then the bits that
were dropped, fewest first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexusquant.entropy.classes import CLASSES, KEYS, UNKNOWN, Classes, Ints, Keys, order, parts
from nexusquant.errors import FormatError, NonFiniteError
from nexusquant.extras import need
from nexusquant.math.e8 import GROUP

REACH = 40
"""n of -40 to 39 have a symbol of their own; the last symbol announces one that has not."""
SYMBOLS = 2 * REACH + 1
_DRAW = 12  # bits of numbers without a symbol that are coded at a time, twice
_DRAWN = 1 << _DRAW
_WIDE = 1 << (2 * _DRAW - 1)


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


class _Encoder:
    """The direction in which symbols are known."""

    knows = True

    def __init__(self) -> None:
        self.coder = need("constriction").stream.queue.RangeEncoder()

    def code(self, symbols: Ints, model: Any) -> Ints:
        self.coder.encode(symbols, model)
        return symbols


class _Decoder:
    """The direction in which symbols are found out."""

    knows = False

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
    if n.size and max(int(n.max()), -int(n.min())) >= _WIDE:
        raise NonFiniteError(f"vectors of {_WIDE} steps or more: too long to code.")
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
    n = np.zeros((*classes.shape, GROUP), np.int32)
    coset = np.zeros(classes.shape, np.int32)
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
    if not coset.size:
        return
    where, counts = order(classes.coset_keys().reshape(-1), 2 * CLASSES)
    bits = coset.reshape(-1)[where]
    for key, at in _runs(counts):
        bits[at] = coder.code(bits[at], tables.coset(*divmod(key, CLASSES)))
    coset.reshape(-1)[where] = bits
    keys = classes.number_keys(coset, np.full_like(coset, UNKNOWN), 1, GROUP)
    n[..., 1:] = _numbers(coder, n[..., 1:], keys, None, tables)
    parity = n[..., 1:].sum(-1, dtype=np.int32) & 1
    keys = classes.number_keys(coset, parity, 0, 1)
    n[..., 0] = _numbers(coder, n[..., 0], keys, parity, tables)


def _numbers(
    coder: _Encoder | _Decoder, n: Ints, keys: Keys, parity: Ints | None, tables: Tables
) -> Ints:
    """Code numbers with these keys; returns them. `parity`: their lowest bits, if known."""
    where, counts = order(keys, KEYS)
    runs = _runs(counts)
    of = parts(np.array([key for key, _ in runs], np.int32))
    halved = (of.known != UNKNOWN).astype(np.int32)
    each = counts[counts > 0]
    drop, offset = _each(of.drop, each), _each(REACH - of.known * halved, each)
    top, halved = _each(2 * REACH >> halved, each), _each(halved, each)
    shape = n.shape
    if coder.knows:
        n = n.reshape(-1)[where]
        shifted = ((n >> drop) + offset) >> halved
        # As unsigned numbers, negative ones are large.
        symbol: Ints = np.minimum(shifted.view(np.uint32), top.view(np.uint32)).view(np.int32)
    else:
        n, symbol = np.zeros((2, len(where)), np.int32)
    for (_, at), key in zip(runs, zip(*of[1:], strict=True), strict=True):
        symbol[at] = coder.code(symbol[at], tables.value(*key))
    high = (symbol << halved) - offset
    (far,) = (symbol == top).nonzero()
    if len(far):
        folded = _fold((n >> drop)[far])
        low = coder.code(folded & (_DRAWN - 1), _uniform(_DRAWN))
        high[far] = _unfold(low | (coder.code(folded >> _DRAW, _uniform(_DRAWN)) << _DRAW))
    if of.drop.any():
        high <<= drop
    for bits in np.unique(of.drop[of.drop > 0]):
        at = slice(each[of.drop < bits].sum(), each[of.drop <= bits].sum())
        even = None if parity is None else parity.reshape(-1)[where[at]]
        high[at] |= _dropped(coder, n[at], int(bits), even)
    found = np.empty_like(high)
    found[where] = high
    return found.reshape(shape)


def _dropped(coder: _Encoder | _Decoder, n: Ints, bits: int, parity: Ints | None) -> Ints:
    """Code the lowest bits of numbers; returns them. The parity is one, where it is known."""
    told = 0 if parity is None else 1
    low = (n >> told) & ((1 << (bits - told)) - 1)
    if bits > told:
        low = coder.code(low, _uniform(1 << (bits - told)))
    return low if parity is None else (low << 1) | parity


def _fold(x: Ints) -> Ints:
    """Signed to unsigned: 0, -1, 1, -2, ..."""
    return (x << 1) ^ (x >> 31)


def _unfold(x: Ints) -> Ints:
    return (x >> 1) ^ -(x & 1)


def _runs(counts: NDArray[np.int64]) -> list[tuple[int, slice]]:
    """Every key that there is, ascending, and where it is in their order."""
    keys = counts.nonzero()[0]
    ends = counts[keys].cumsum()
    starts = ends - counts[keys]
    both = zip(starts.tolist(), ends.tolist(), strict=True)
    return list(zip(keys.tolist(), (slice(*one) for one in both), strict=True))


def _each(x: Ints, counts: NDArray[np.int64]) -> Ints:
    """Of every number what its run has; one for all if all have the same."""
    x = x.astype(np.int32)
    return x[:1] if (x == x[0]).all() else np.repeat(x, counts)


@lru_cache(maxsize=32)
def _uniform(size: int) -> Any:
    return need("constriction").stream.model.Uniform(size)
