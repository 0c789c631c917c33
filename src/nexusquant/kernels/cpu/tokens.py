"""Attention to some tokens of one KV head: logits, softmax so far, and sums of values."""

from __future__ import annotations

import math

import numpy as np

from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu.code import STRIDE, decode_group
from nexusquant.kernels.cpu.compiled import inner
from nexusquant.kernels.cpu.memory import (
    float_of,
    get_byte,
    get_float,
    get_int,
    get_long,
    get_number,
    get_short,
    load,
    load_bytes,
    load_some_bytes,
    lookup,
    put_float,
    put_int,
    store,
)
from nexusquant.kernels.cpu.rows import (
    rows_add_product,
    rows_add_scaled,
    rows_choose,
    rows_load,
    rows_of,
    rows_scale_shift,
    rows_store,
)
from nexusquant.kernels.cpu.simd import LANES, choose, exp, fma, lane_numbers, largest, splat, total

f32, i32, i64 = np.float32, np.int32, np.int64
TILE = 128
"""Tokens whose probabilities are held."""
HIDDEN = f32(-np.inf)


@inner
def positions(part, b, h, out):
    """Slots of one head's entries, times 2, plus 1 where empty, to int32 at `out`."""
    count, kind = get_long(part, at.TOKENS), get_long(part, at.SLOT_KIND)
    start, held = get_long(part, at.SLOT_START), get_long(part, at.SLOT_DATA)
    source = b * get_long(part, at.SLOT_BATCH) + h * get_long(part, at.SLOT_HEAD)
    slot = start - 1
    if kind == at.BITMAP:
        entry, byte = 0, 0
        while entry < count:
            if byte >= get_long(part, at.SLOT_BYTES):  # behind the last one
                put_int(out, entry, i32(2 * slot + 1))
                entry += 1
                continue
            bits = i64(get_byte(held, source + byte))
            for i in range(8):
                if bits >> i & 1 and entry < count:
                    slot = start + 8 * byte + i
                    put_int(out, entry, i32(2 * slot))
                    entry += 1
            byte += 1
        return
    for entry in range(count):
        gap = i64(1)
        if kind == at.GAPS_8:
            gap = i64(get_byte(held, source + entry))
        elif kind == at.GAPS_16:
            gap = i64(get_short(held, source + entry))
        elif kind == at.GAPS_32:
            gap = i64(get_int(held, source + entry))
        slot += gap
        put_int(out, entry, i32(2 * max(slot, start) + (gap == 0)))


@inner
def first_on_page(where, count, page_of, page):
    """First entry on `page` or a later one."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if get_int(page_of, get_int(where, middle) >> 1) < page:
            low = middle + 1
        else:
            high = middle
    return low


@inner
def _groups(table, width, head):
    """Address of a head's coded groups, and their number."""
    start = table + 16 * width * head
    return start + 16, i64(get_int(start, 0))


@inner
def _sizes(part, b, hp, t):
    """Gain codes of keys and values of 16 tokens."""
    count = get_long(part, at.TOKENS)
    place = (b * get_long(part, at.HEADS) + hp) * count + t
    if t + LANES <= count:
        return load_bytes(get_long(part, at.GAINS), place)
    return load_some_bytes(get_long(part, at.GAINS), place, lane_numbers() < splat(i32(count - t)))


@inner
def add_bias(bias, b, h, rows, real, q_len, where, t0, n, logits):
    """Adds what the mask says to the logits of tokens t0 to t0 + n - 1; -inf where it has nothing,
    and of empty entries. Without an address, all others are visible. Only the first `real` rows
    are of queries.
    """
    for r in range(rows):
        own = min(r, real - 1)
        start = b * bias.batch + h * bias.kv_head + own // q_len * bias.head
        start += own % q_len * bias.query
        for i in range(n):
            twice = i64(get_int(where, t0 + i))
            column = (twice >> 1) - bias.first_column
            spot = r * TILE + i
            if twice & 1 or (bias.address and (column < 0 or column >= bias.columns)):
                put_float(logits, spot, HIDDEN)
            elif bias.address:
                put_float(
                    logits, spot, get_float(logits, spot) + get_float(bias.address, start + column)
                )


@inner
def tile(rows, codes, gains, part, b, hp, where, t0, n, page_of, page0, queries, constants, width,
         keys, logits):  # fmt: skip
    """Logits of tokens t0 to t0 + n - 1 to (R, TILE) at `logits`; others are -inf."""
    R = len(rows)
    count = get_long(part, at.TOKENS)
    rows_at = get_long(part, at.KEY_ROWS) + b * get_long(part, at.KEY_BYTES) * count
    table, groups = _groups(get_long(part, at.KEY_GROUPS), get_long(part, at.KEY_WIDTH), hp)
    for block in range((n + LANES - 1) // LANES):
        t = t0 + LANES * block
        there = lane_numbers() < splat(i32(t0 + n - t))
        full, mask = t + LANES <= count, lane_numbers() < splat(i32(count - t))
        for j in range(groups):
            bits, first = get_int(table, 4 * j + 1), get_int(table, 4 * j + 2)
            code, lowest = codes + 4 * STRIDE * bits, get_int(table, 4 * j + 3)
            held = rows_at + first * count
            decode_group(
                code, bits, lowest, held, count, t, full, mask, keys + 4 * 8 * LANES * j, LANES
            )
        gain = lookup(gains, _sizes(part, b, hp, t) & splat(i32(15)))
        last = min(t + LANES, t0 + n) - 1
        begin = get_int(page_of, get_int(where, t) >> 1)
        result = rows_of(rows, splat(HIDDEN))
        lane = 0
        page = begin
        while True:
            stop = lane  # lanes of this page: lane to stop - 1
            while t + stop <= last and get_int(page_of, get_int(where, t + stop) >> 1) == page:
                stop += 1
            sums = rows_of(rows, splat(f32(0)))
            base = (page - page0) * R * width
            for j in range(groups):
                dim = 8 * i64(get_int(table, 4 * j))
                for i in range(8):
                    y = load(keys, LANES * (8 * j + i))
                    sums = rows_add_scaled(sums, y, queries, base + dim + i, width)
            sums = rows_scale_shift(sums, gain, constants, page - page0, LANES)
            mine = there & ~(lane_numbers() < splat(i32(lane)))
            result = rows_choose(mine, sums, result)
            if stop > last - t:
                break
            lane, page = stop, get_int(page_of, get_int(where, t + stop) >> 1)
        rows_store(result, logits, LANES * block, TILE)


@inner
def soften(R, logits, blocks, softcap):
    for r in range(R):
        for block in range(blocks):
            x = load(logits, r * TILE + LANES * block)
            z = x * splat(f32(2) / softcap)
            e = exp(choose(z > splat(f32(88)), splat(f32(88)), z))
            y = splat(softcap) - splat(f32(2) * softcap) / (e + splat(f32(1)))
            store(logits, r * TILE + LANES * block, choose(x > splat(HIDDEN), y, x))


@inner
def weigh(R, logits, blocks, gains, part, b, hp, t0, tops, sums, output, dims):
    """Probabilities in place of logits, times the values' gains; earlier ones are rescaled."""
    for r in range(R):
        top = splat(HIDDEN)
        for block in range(blocks):
            x = load(logits, r * TILE + LANES * block)
            top = choose(x > top, x, top)
        best, old = largest(top), get_float(tops, r)
        if best > old:
            decay = f32(math.exp(old - best)) if old > HIDDEN else f32(0)
            put_float(tops, r, best)
            put_float(sums, r, get_float(sums, r) * decay)
            for d in range(dims):
                spot = LANES * (d * R + r)
                store(output, spot, load(output, spot) * splat(decay))
        best = max(best, old)
        mass = splat(f32(0))
        for block in range(blocks):
            x = load(logits, r * TILE + LANES * block)
            p = choose(x == x, splat(f32(0)), x)  # NaN stays NaN
            if best > HIDDEN:
                p = exp(x - splat(best))
            mass = mass + p
            store(logits, r * TILE + LANES * block, p)
        put_float(sums, r, get_float(sums, r) + total(mass))
    for block in range(blocks):
        t = t0 + LANES * block
        gain = lookup(gains, _sizes(part, b, hp, t) >> splat(i32(4)))
        for r in range(R):
            spot = r * TILE + LANES * block
            store(logits, spot, load(logits, spot) * gain)


@inner
def add_values(rows, codes, part, b, hp, t0, blocks, weights, values, output):
    """Weighted codewords of values, summed per lane: output (dims, R, 16)."""
    R = len(rows)
    count = get_long(part, at.TOKENS)
    rows_at = get_long(part, at.VALUE_ROWS) + b * get_long(part, at.VALUE_BYTES) * count
    table, groups = _groups(get_long(part, at.VALUE_GROUPS), get_long(part, at.VALUE_WIDTH), hp)
    for j in range(groups):
        bits, first = get_int(table, 4 * j + 1), get_int(table, 4 * j + 2)
        code, lowest = codes + 4 * STRIDE * bits, get_int(table, 4 * j + 3)
        for block in range(blocks):
            t = t0 + LANES * block
            full, mask = t + LANES <= count, lane_numbers() < splat(i32(count - t))
            out = values + 4 * LANES * block
            decode_group(
                code, bits, lowest, rows_at + first * count, count, t, full, mask, out, TILE
            )
        for i in range(8):
            spot = LANES * R * (8 * i64(get_int(table, 4 * j)) + i)
            sums = rows_load(rows_of(rows, splat(f32(0))), output, spot, LANES)
            for block in range(blocks):
                y = load(values, i * TILE + LANES * block)
                sums = rows_add_product(sums, y, weights, LANES * block, TILE)
            rows_store(sums, output, spot, LANES)


@inner
def exact_part(call, bias, part, b, h, hp, R, query, where, tops, sums, output, space):
    """Uncoded tokens: logits from the queries as they are, values summed as they are.

    space: room for a vector of up to 512 and R logits, `TILE` apart.
    """
    vector, logits, dim = space, space + 4 * 512, call.dim
    softcap, kind = float_of(call.softcap), get_long(part, at.DTYPE)
    keys, values = get_long(part, at.KEYS), get_long(part, at.VALUES)
    keys_at = b * get_long(part, at.KEY_BATCH) + hp * get_long(part, at.KEY_HEAD)
    values_at = b * get_long(part, at.VALUE_BATCH) + hp * get_long(part, at.VALUE_HEAD)
    for t in range(get_long(part, at.TOKENS)):
        start = keys_at + t * get_long(part, at.KEY_TOKEN)
        for d in range(dim):
            put_float(vector, d, get_number(keys, kind, start + d))
        for r in range(R):
            lanes, whole, dot = splat(f32(0)), dim // LANES, f32(0)
            for v in range(whole):
                lanes = fma(load(vector, LANES * v), load(query, r * dim + LANES * v), lanes)
            for d in range(LANES * whole, dim):
                dot += get_float(vector, d) * get_float(query, r * dim + d)
            dot += total(lanes)
            if softcap > 0:
                dot = softcap * f32(math.tanh(dot / softcap))
            put_float(logits, r * TILE, dot)
        add_bias(bias, b, h, R, call.rows, call.q_len, where, t, 1, logits)
        start = values_at + t * get_long(part, at.VALUE_TOKEN)
        for d in range(call.dim_v):
            put_float(vector, d, get_number(values, kind, start + d))
        for r in range(R):
            x, old = get_float(logits, r * TILE), get_float(tops, r)
            if x == HIDDEN:
                continue
            decay = f32(1)
            if x > old or x != x:  # NaN spreads
                decay = f32(math.exp(old - x)) if old > HIDDEN else f32(0)
                put_float(tops, r, x)
            p = f32(math.exp(x - max(x, old)))
            put_float(sums, r, get_float(sums, r) * decay + p)
            for d in range(call.dim_v):
                spot = r * call.dim_v + d
                put_float(output, spot, get_float(output, spot) * decay + p * get_float(vector, d))
