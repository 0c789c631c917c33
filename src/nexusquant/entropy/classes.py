"""Classes of numbers: how large they may be expected to be, known before any byte of a page.

A class is a deviation over the step, in thirds of an octave. Numbers above the last class drop bits
until they fit. A key is all that the model of a number depends on:

    key = ((((dropped bits * 2 + side) * CLASSES + class) * 2 + coset) * 3) + known parity
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nexusquant.kernels.storage import storage

CLASSES = 16
"""Deviations of 2^-3 to 2^2 steps, and what is below."""
_OCTAVE = 3  # classes
_THIRD = 4  # levels of a class
_LOW = -38  # the level where class 0 begins; it has all that is below, too
_MOST_DROPPED = 18  # numbers that are still too large are above all that can be coded
UNKNOWN = 2
"""For a parity that is not known; it never is where bits are dropped."""
KEYS = (_MOST_DROPPED + 1) * 2 * CLASSES * 6
"""All keys are below."""

Ints = NDArray[np.int32]
Keys = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Classes:
    """What both sides know of a page before any of its bytes, coded groups only.

    Levels are 12 log2(deviation / step), of a page's first token and of the others.

    Attributes:
        side: (groups,), 0 for keys, 1 for values.
        group: (2, groups), levels of groups, which coset bits are coded by.
        value: (2, groups, 8), levels of the numbers.
        extra: (tokens,), what is taken off the levels of every token.
    """

    side: Ints
    group: Ints
    value: Ints
    extra: Ints

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and groups."""
        return len(self.extra), len(self.side)

    def coset_keys(self) -> Keys:
        """Of all coset bits, (tokens, groups): side * CLASSES + class."""
        known = self._known(self.group) % (2 * CLASSES)
        return (known + CLASSES * self.side).astype(np.int16)

    def number_keys(self, coset: Ints, parity: Ints, start: int, stop: int) -> Keys:
        """Of numbers `start` to `stop` - 1 of all groups, flat.

        Args:
            coset, parity: (tokens, groups).
        """
        fast = storage()
        if fast is not None:
            at = start, stop
            return fast.number_keys(
                self.value, self.extra, _TABLE, _LOW, self.side, coset, parity, *at
            )
        known = self._known(self.value[..., start:stop])
        even = np.where(known < 2 * CLASSES, parity[..., None], UNKNOWN)
        key = ((known + CLASSES * self.side[:, None]) * 2 + coset[..., None]) * 3 + even
        return key.astype(np.int16).reshape(-1)

    def _known(self, level: Ints) -> Ints:
        """Dropped bits * 2 CLASSES + class, of every token."""
        first = np.minimum(np.arange(len(self.extra)), 1)
        shift = self.extra.reshape(-1, *(1,) * (level.ndim - 1)) + _LOW
        return _TABLE[np.clip(level[first] - shift, 0, len(_TABLE) - 1)].astype(np.int32)


def order(key: Keys, kinds: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stable order of key (n,), and how often each of 0 to `kinds` - 1 occurs."""
    fast = storage()
    if fast is not None:
        return fast.order(key, kinds)
    return np.argsort(key, kind="stable"), np.bincount(key, minlength=kinds)


class Parts(NamedTuple):
    """What keys are made of."""

    drop: Ints
    side: Ints
    cls: Ints
    coset: Ints
    known: Ints


def parts(key: Ints) -> Parts:
    """Keys taken apart."""
    rest, known = np.divmod(key, 3)
    rest, coset = np.divmod(rest, 2)
    rest, cls = np.divmod(rest, CLASSES)
    drop, side = np.divmod(rest, 2)
    return Parts(drop, side, cls, coset, known)


def _class_table() -> Keys:
    """Dropped bits * 2 CLASSES + class, by level - _LOW."""
    cls = np.arange(_THIRD * (CLASSES + _OCTAVE * _MOST_DROPPED)) // _THIRD
    drop = np.maximum(-((CLASSES - 1 - cls) // _OCTAVE), 0)
    return (drop * 2 * CLASSES + cls - _OCTAVE * drop).astype(np.int16)


_TABLE = _class_table()
