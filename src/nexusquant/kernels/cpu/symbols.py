"""The storage codec's symbols in the order that they are coded in (`entropy.symbols`)."""

from __future__ import annotations

import numpy as np
from numba import types

from nexusquant.kernels.cpu.compiled import Kernel

_UNKNOWN = 2
_SIDE = 16  # classes


def _order(key, counts, order):
    """Stable order of `key`; `counts`, zeros, becomes how often each occurs."""
    for i in range(len(key)):
        counts[key[i]] += 1
    starts = np.empty(len(counts), np.int64)
    start = 0
    for k in range(len(counts)):
        starts[k] = start
        start += counts[k]
    for i in range(len(key)):
        k = key[i]
        order[starts[k]] = i
        starts[k] += 1


def _number_keys(level, extra, table, low, side, coset, parity, start, stop, key):
    last, at = len(table) - 1, 0
    for t in range(len(extra)):
        row, shift = min(t, 1), extra[t] + low
        for g in range(len(side)):
            c, p = coset[t, g], parity[t, g]
            for i in range(start, stop):
                cls = table[min(max(level[row, g, i] - shift, 0), last)]
                known = p if cls < _SIDE * 2 else _UNKNOWN
                key[at] = ((cls + _SIDE * side[g]) * 2 + c) * 3 + known
                at += 1


_long, _int, _short = types.int64, types.int32, types.int16
order = Kernel(_order, types.void(_short[::1], _long[::1], _long[::1]), "order")
number_keys = Kernel(
    _number_keys,
    types.void(
        _int[:, :, ::1], _int[::1], _short[::1], _long, _int[::1], _int[:, ::1], _int[:, ::1],
        _long, _long, _short[::1],
    ),
    "number-keys",
)  # fmt: skip
