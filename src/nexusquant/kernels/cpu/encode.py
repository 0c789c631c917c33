"""Gain, nearest codewords and packing in one pass over vectors in code space; and the way back."""

from __future__ import annotations

import numpy as np

from nexusquant.kernels.cpu.arguments import read_coding
from nexusquant.kernels.cpu.code import PRICE, REACH, STRIDE, decode_group, encode_group
from nexusquant.kernels.cpu.compiled import Task, inner
from nexusquant.kernels.cpu.memory import (
    float_of,
    get_float,
    get_int,
    keep,
    load,
    load_bytes,
    load_some_bytes,
    lookup,
    put_float,
    put_int,
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

f32, i32, i64 = np.float32, np.int32, np.int64
RUN = 512
"""Tokens per task."""
_GAINS = 16
_STEPS = 6


@inner
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


@inner
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


def _encode(arguments, task):
    """Vectors in code space to rows of codes and gains; see `arguments.Coding`."""
    call = read_coding(arguments)
    codes, tokens, dim, limit = call.codes, call.tokens, call.dim, float_of(call.limit)
    row, run = task // call.runs, task % call.runs
    table = call.groups + 16 * call.width * (row % call.heads)
    count, table = get_int(table, 0), table + 16
    space = np.empty((dim + 8) * LANES, np.float32)
    spare, unit = space.ctypes.data, space.ctypes.data + 4 * dim * LANES
    target = call.rows + (row // call.heads) * call.rows_batch
    bad = splat(f32(0))
    for at in range(run * RUN, min(tokens, (run + 1) * RUN), LANES):
        full, mask = at + LANES <= tokens, lane_numbers() < splat(i32(tokens - at))
        x, stride = call.y + 4 * (row * dim * tokens + at), tokens
        if not full:
            for d in range(dim):
                for t in range(LANES):
                    value = get_float(x, d * tokens + t) if at + t < tokens else f32(0)
                    put_float(spare, d * LANES + t, value)
            x, stride = spare, LANES
        chosen, wrong = _gains(codes, call.gains, table, count, dim, x, stride, limit)
        bad = bad + choose(wrong & mask, splat(f32(1)), splat(f32(0)))
        gain = lookup(call.gains, chosen)
        if full:
            store_bytes(call.sizes, row * tokens + at, chosen)
        else:
            store_some_bytes(call.sizes, row * tokens + at, chosen, mask)
        for j in range(count):
            group, bits = get_int(table, 4 * j), get_int(table, 4 * j + 1)
            first, lowest = get_int(table, 4 * j + 2), get_int(table, 4 * j + 3)
            for i in range(8):
                store(unit, LANES * i, load(x, stride * (8 * group + i)) / gain)
            code = codes + 4 * STRIDE * bits
            out = target + first * tokens
            encode_group(code, bits, lowest, unit, LANES, out, tokens, at, full, mask)
    put_int(call.bad, task, i32(total(bad)))
    keep(space)


def _decode(arguments, task):
    """The way back: y is zero where nothing is coded, which it is before."""
    call = read_coding(arguments)
    tokens, dim = call.tokens, call.dim
    row, run = task // call.runs, task % call.runs
    batch, head = row // call.heads, row % call.heads
    table = call.groups + 16 * call.width * head
    count, table = get_int(table, 0), table + 16
    source = call.rows + batch * call.rows_batch
    space = np.empty(8 * LANES, np.float32)
    part = space.ctypes.data
    for at in range(run * RUN, min(tokens, (run + 1) * RUN), LANES):
        full, mask = at + LANES <= tokens, lane_numbers() < splat(i32(tokens - at))
        place = batch * call.sizes_batch + head * call.sizes_head + at
        size = load_bytes(call.sizes, place) if full else load_some_bytes(call.sizes, place, mask)
        gain = lookup(call.gains, size)
        out = call.y + 4 * (row * dim * tokens + at)
        for j in range(count):
            group, bits = get_int(table, 4 * j), get_int(table, 4 * j + 1)
            first, lowest = get_int(table, 4 * j + 2), get_int(table, 4 * j + 3)
            code = call.codes + 4 * STRIDE * bits
            held = source + first * call.rows_row
            decode_group(code, bits, lowest, held, call.rows_row, at, full, mask, part, LANES)
            for i in range(8):
                value = load(part, LANES * i) * gain
                if full:
                    store(out, tokens * (8 * group + i), value)
                else:
                    store_some(out, tokens * (8 * group + i), value, mask)
    keep(space)


encode, decode = Task(_encode, "encode"), Task(_decode, "decode")
