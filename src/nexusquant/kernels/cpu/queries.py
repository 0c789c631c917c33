"""Queries in the code space of keys, for many pages at once."""

from __future__ import annotations

import numpy as np

from nexusquant.kernels.cpu.compiled import inner
from nexusquant.kernels.cpu.memory import get_float, get_int, get_number, load, put_float, store
from nexusquant.kernels.cpu.rows import rows_add_scaled, rows_load, rows_of, rows_store
from nexusquant.kernels.cpu.simd import LANES, splat

f32 = np.float32
PAGES = 16
"""Pages whose queries are held."""
ALL_PAGES = (0,) * PAGES


@inner
def _add_scaled(out, at, source, index, factor, width):
    for v in range(width // LANES):
        one = rows_load(rows_of((0,), splat(f32(0))), out, at + LANES * v, 0)
        y = load(source, index + LANES * v) * splat(factor)
        store(out, at + LANES * v, one[0] + y)


@inner
def query_basis(call, key, row, h, rows, basis, shift):
    """What [cos sin 1] of a page is multiplied with, of one KV head.

    Args:
        call, key: see `arguments`.
        row, h: which row and head, in row * kv_heads + head, and the head.
        rows: queries, real or not.
        basis, shift: addresses of (2 F + 1, rows, width) and (2 F + 1, rows), to be filled: the
            coordinates, and what the mean adds to logits.
    """
    columns, width, dim = call.columns, call.width, call.dim
    query, inverse = call.query + 4 * row * rows * dim, key.inverse + 4 * h * dim * key.row
    if key.heads == 1:
        inverse = key.inverse
    for k in range((2 * columns + 1) * rows * width // LANES):
        store(basis, LANES * k, splat(f32(0)))
    for k in range((2 * columns + 1) * rows):
        put_float(shift, k, f32(0))
    for i in range(dim):
        frequency = get_int(call.rotary, 3 * i)
        partner, sign = get_int(call.rotary, 3 * i + 1), f32(get_int(call.rotary, 3 * i + 2))
        factor, centre = f32(1), f32(0)
        if key.scale:
            spot = row * key.scale_row + (i if key.scale_row > 1 else 0)
            factor = get_number(key.scale, key.scale_kind, spot)
        if key.mean:
            centre = get_number(key.mean, key.mean_kind, row * key.mean_row + i)
        for r in range(rows):
            own = get_float(query, r * dim + i)
            at = (2 * columns if frequency < 0 else frequency) * rows + r
            put_float(shift, at, get_float(shift, at) + own * centre)
            _add_scaled(basis, at * width, inverse, i * key.row, own * factor, width)
            if frequency >= 0:
                other = -sign * get_float(query, r * dim + partner)
                at = (columns + frequency) * rows + r
                put_float(shift, at, get_float(shift, at) + other * centre)
                _add_scaled(basis, at * width, inverse, i * key.row, other * factor, width)


@inner
def page_queries(call, b, first, rows, basis, shift, out, constants):
    """Queries in the code space of 16 pages: (pages, rows, width), and (rows, pages) constants."""
    held, columns, width = call.held, call.columns, call.width
    turns = call.turns + 4 * b * call.turns_batch
    for r in range(rows):
        for v in range(width // LANES):
            pages = rows_of(ALL_PAGES, splat(f32(0)))
            for k in range(2 * columns + 1):
                y = load(basis, (k * rows + r) * width + LANES * v)
                pages = rows_add_scaled(pages, y, turns, k * held + first, 1)
            rows_store(pages, out, r * width + LANES * v, rows * width)
        sums = splat(f32(0))
        for k in range(2 * columns + 1):
            sums = sums + load(turns, k * held + first) * splat(get_float(shift, k * rows + r))
        store(constants, r * LANES, sums)
