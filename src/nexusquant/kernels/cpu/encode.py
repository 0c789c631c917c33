"""Gain, nearest codewords and packing in one pass over vectors in code space; and the way back."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from nexusquant.kernels.cpu.code import PRICE, REACH, STRIDE, decode_group, encode_group
from nexusquant.kernels.cpu.memory import (
    get_float,
    get_int,
    keep,
    load,
    load_bytes,
    load_some_bytes,
    lookup,
    put_float,
    store,
    store_bytes,
    store_some,
    store_some_bytes,
)
from nexusquant.kernels.cpu.simd import (
    LANES,
    absolute,
    any_lane,
    choose,
    fma,
    lane_numbers,
    splat,
    sqrt,
    total,
)
from nexusquant.kernels.cpu.sources import SOURCES

f32, i32, i64 = np.float32, np.int32, np.int64
_RUN = 512  # tokens per task
_GAINS = 16
_STEPS = 6


@njit
def _clipped(codes, groups, count, x, stride, gain):
    """What clipping at `gain` costs, coordinates at x + 4 stride d."""
    lost = splat(f32(0))
    for j in range(count):
        code = codes + 4 * STRIDE * get_int(groups, 4 * j + 1)
        reach = splat(get_float(code, REACH)) * gain
        part = splat(f32(0))
        for i in range(8):
            over = absolute(load(x, stride * (8 * get_int(groups, 4 * j) + i))) - reach
            over = choose(over > splat(f32(0)), over, splat(f32(0)))
            part = fma(over, over, part)
        lost = fma(part, splat(get_float(code, PRICE)), lost)
    return lost


@njit
def _gains(codes, gains, groups, count, dim, x, stride, limit):
    """Gain codes of 16 vectors, and which have none: their RMS, unless that clips too much."""
    energy = splat(f32(0))
    for d in range(dim):  # NaN or infinity, whether stored or not
        energy = fma(load(x, stride * d), splat(f32(0)), energy)
    for j in range(count):
        for i in range(8):
            value = load(x, stride * (8 * get_int(groups, 4 * j) + i))
            energy = fma(value, value, energy)
    dims = splat(f32(max(8 * count, 1)))
    rms = sqrt(energy / dims)
    chosen = splat(i32(0))
    for k in range(_GAINS - 1):
        edge = splat(get_float(gains, _GAINS + k))
        chosen = chosen + choose(rms > edge, splat(i32(1)), splat(i32(0)))
    gain = lookup(gains, chosen)
    granular = dims * gain * gain
    lost = _clipped(codes, groups, count, x, stride, gain)
    if any_lane(lost > granular):
        much = lost > granular
        start, best, least = chosen, chosen, lost + granular
        for step in range(1, _STEPS + 1):
            tried = start + splat(i32(step))
            tried = choose(tried < splat(i32(_GAINS)), tried, splat(i32(_GAINS - 1)))
            gain = lookup(gains, tried)
            cost = _clipped(codes, groups, count, x, stride, gain) + dims * gain * gain
            best = choose(cost < least, tried, best)
            least = choose(cost < least, cost, least)
        chosen = choose(much, best, start)
    return chosen, ~(rms <= splat(limit))  # NaN compares as false


@njit(parallel=True)
def _encode(codes, gains, limit, groups, width, batch, heads, dim, tokens, y, rows, sizes):
    """Vectors in code space to rows of codes and gains.

    Args:
        codes: address of the code tables, one of `STRIDE` floats per rate.
        gains: address of the 16 gains and the 15 boundaries between them.
        limit: largest size with a gain.
        groups: address of (heads, width, 4) int32: per head how many groups are coded, then for
            each its number, rate, first row, and the mask of the lowest bits of a word.
        y, rows, sizes: addresses of (batch, heads, dim, tokens) fp32, (batch, row_bytes, tokens)
            and (batch, heads, tokens) uint8. Row_bytes is in the entry behind the last head's.

    Returns:
        How many vectors are NaN, infinite or above the limit.
    """
    row_bytes = get_int(groups, 4 * heads * width)
    runs = (tokens + _RUN - 1) // _RUN
    bad = 0
    for task in prange(batch * heads * runs):
        row, run = task // runs, task % runs
        table = groups + 16 * width * (row % heads)
        count, table = get_int(table, 0), table + 16
        space = np.empty((dim + 8) * LANES, np.float32)
        spare, unit = space.ctypes.data, space.ctypes.data + 4 * dim * LANES
        target = rows + (row // heads) * row_bytes * tokens
        for at in range(run * _RUN, min(tokens, (run + 1) * _RUN), LANES):
            full, mask = at + LANES <= tokens, lane_numbers() < splat(i32(tokens - at))
            x, stride = y + 4 * (row * dim * tokens + at), tokens
            if not full:
                for d in range(dim):
                    for t in range(LANES):
                        value = get_float(x, d * tokens + t) if at + t < tokens else f32(0)
                        put_float(spare, d * LANES + t, value)
                x, stride = spare, LANES
            chosen, wrong = _gains(codes, gains, table, count, dim, x, stride, limit)
            bad += i64(total(choose(wrong & mask, splat(f32(1)), splat(f32(0)))))
            gain = lookup(gains, chosen)
            if full:
                store_bytes(sizes, row * tokens + at, chosen)
            else:
                store_some_bytes(sizes, row * tokens + at, chosen, mask)
            for j in range(count):
                group, bits = get_int(table, 4 * j), get_int(table, 4 * j + 1)
                first, lowest = get_int(table, 4 * j + 2), get_int(table, 4 * j + 3)
                for i in range(8):
                    store(unit, LANES * i, load(x, stride * (8 * group + i)) / gain)
                code = codes + 4 * STRIDE * bits
                out = target + first * tokens
                encode_group(code, bits, lowest, unit, LANES, out, tokens, at, full, mask)
        keep(space)
    return bad


@njit(parallel=True)
def _decode(codes, gains, groups, width, batch, heads, dim, tokens, rows, sizes, y):
    """Inverse of `encode`: y is (batch, heads, dim, tokens), zero where nothing is coded.

    Both may be slices: `rows` and `sizes` are (address, batch stride, row or head stride).
    """
    runs = (tokens + _RUN - 1) // _RUN
    for task in prange(batch * heads * runs):
        row, run = task // runs, task % runs
        table = groups + 16 * width * (row % heads)
        count, table = get_int(table, 0), table + 16
        source = rows[0] + (row // heads) * rows[1]
        space = np.empty(8 * LANES, np.float32)
        part = space.ctypes.data
        for at in range(run * _RUN, min(tokens, (run + 1) * _RUN), LANES):
            full, mask = at + LANES <= tokens, lane_numbers() < splat(i32(tokens - at))
            place = (row // heads) * sizes[1] + (row % heads) * sizes[2] + at
            size = load_bytes(sizes[0], place) if full else load_some_bytes(sizes[0], place, mask)
            gain = lookup(gains, size)
            out = y + 4 * (row * dim * tokens + at)
            for j in range(count):
                group, bits = get_int(table, 4 * j), get_int(table, 4 * j + 1)
                first, lowest = get_int(table, 4 * j + 2), get_int(table, 4 * j + 3)
                code = codes + 4 * STRIDE * bits
                held = source + first * rows[2]
                decode_group(code, bits, lowest, held, rows[2], at, full, mask, part, LANES)
                for i in range(8):
                    value = load(part, LANES * i) * gain
                    if full:
                        store(out, tokens * (8 * group + i), value)
                    else:
                        store_some(out, tokens * (8 * group + i), value, mask)
        keep(space)


def _kept(sources):
    @njit(cache=True, nogil=True)
    def encode(codes, gains, limit, groups, width, batch, heads, dim, tokens, y, rows, sizes):
        _ = sources
        return _encode(
            codes, gains, limit, groups, width, batch, heads, dim, tokens, y, rows, sizes
        )

    @njit(cache=True, nogil=True)
    def decode(codes, gains, groups, width, batch, heads, dim, tokens, rows, sizes, y):
        _ = sources
        _decode(codes, gains, groups, width, batch, heads, dim, tokens, rows, sizes, y)

    return encode, decode


encode, decode = _kept(SOURCES)
