"""What the Numba kernels look up: codes, gains and row layouts as flat arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from nexusquant.kernels.cpu.code import BINS, COSET, EDGES, PER_UNIT, PRICE, REACH, STARTS, STRIDE
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, DISTORTION, GROUP, Book, polynomial, split_bits
from nexusquant.math.gains import GAINS, boundaries, decode_gain


@lru_cache(maxsize=16)
def code_tables(book: Book) -> np.ndarray:
    """(9, STRIDE) fp32, see `code.STRIDE`. Coefficients are of 2 u + 1 - 2^(b+1)."""
    out = np.zeros((len(BITS) + 1, STRIDE), np.float32)
    for bits in BITS:
        code, unit = book[bits], 2.0 ** (bits + 1)
        table = code.levels().numpy()
        for j, c in enumerate(polynomial(bits, code.kind, code.widen)):
            out[bits, j] = c / unit ** (2 * j + 1)
        out[bits, REACH], out[bits, PRICE] = table[-1], 1 / DISTORTION[bits]
        out[bits, PER_UNIT] = per_unit = BINS / (2 * table[-1])
        for coset in (0, 1):
            own = table[coset::2]
            start = EDGES + COSET * coset
            edges = (own[1:] + own[:-1]) / 2
            out[bits, start : start + len(edges)] = edges
            out[bits, start + len(edges)] = np.inf
            # A thousandth of a bin early, as the bin of an x is found with rounding.
            below = (np.arange(BINS) - 1e-3) / per_unit - table[-1]
            starts = STARTS + BINS * coset
            out[bits, starts : starts + BINS] = np.searchsorted(edges, below)
    return out


@lru_cache(maxsize=1)
def gain_table() -> np.ndarray:
    """The 16 gains and the 15 boundaries between them, fp32."""
    cpu = torch.device("cpu")
    gains = decode_gain(torch.arange(GAINS, dtype=torch.uint8))
    return torch.cat([gains, boundaries(cpu)]).numpy()


@lru_cache(maxsize=8192)
def group_table(layout: RowLayout) -> np.ndarray:
    """(heads (groups + 1) + 1, 4) int32: per head the number of coded groups, then for each its
    number, rate, first row and mask of the lowest bits of its fields; last the rows of all."""
    width = layout.groups + 1
    out = np.zeros((layout.heads * width + 1, 4), np.int64)
    first = 0
    for head, rates in enumerate(layout.rates):
        at = head * width
        for group, bits in enumerate(rates):
            if bits:
                out[at, 0] += 1
                lowest = sum(1 << (split_bits(bits)[0] * i) for i in range(GROUP))
                out[at + out[at, 0]] = group, bits, first, lowest
                first += bits
    out[-1, 0] = first
    return out.astype(np.uint32).view(np.int32)


class Lookup(NamedTuple):
    """What encoding and decoding look up; asking NumPy for an address takes a microsecond.

    Attributes:
        codes, gains, groups: addresses of `code_tables`, `gain_table` and `group_table`.
        keep: the arrays themselves.
    """

    codes: int
    gains: int
    groups: int
    keep: tuple[np.ndarray, ...]


@lru_cache(maxsize=8192)
def lookups(layout: RowLayout, book: Book) -> Lookup:
    """Tables for the rows of a layout."""
    arrays = code_tables(book), gain_table(), group_table(layout)
    codes, gains, groups = (x.ctypes.data for x in arrays)
    return Lookup(codes, gains, groups, arrays)


@lru_cache(maxsize=8192)
def coded_width(layout: RowLayout) -> int:
    """Coordinates up to the last coded one of any head, a multiple of 16."""
    last = max((g + 1 for rates in layout.rates for g, bits in enumerate(rates) if bits), default=1)
    return -(-last * GROUP // 16) * 16


@lru_cache(maxsize=1024)
def head_map(heads: tuple[int, ...] | None, kv_heads: int) -> np.ndarray:
    """(kv_heads,) int32: which head of a part it is, -1 if none."""
    out = np.arange(kv_heads, dtype=np.int32)
    if heads is not None:
        out[:] = -1
        out[list(heads)] = np.arange(len(heads))
    return out
