"""Attention of few queries over codes: logits, then values, each decoded in registers.

Queries come in the code space of every page of keys (`queries`). A program has one tile of tokens
of one KV head, whose queries share the decoding. It leaves weights that already include the gains
of values, so that `values` is nothing but a product of codewords with them. Splits are merged by
their log-sum-exp in `merge`. Logarithms are of base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nexusquant.kernels.gpu.code import codewords, coordinate

HIDDEN = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)

# Columns of the int64 table of parts. Strides count elements, 0 where all share one. SLOTS is where
# in PLACES its slots begin, -1 if they are contiguous.
TOKENS, TILE, HEAD_MAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SLOTS, SLOT_START, SLOT_BATCH, SLOT_HEAD = (tl.constexpr(i) for i in range(3, 7))
KEYS, KEY_BATCH, KEY_HEAD, KEY_TOKEN = (tl.constexpr(i) for i in range(7, 11))
VALUES, VALUE_BATCH, VALUE_HEAD, VALUE_TOKEN = (tl.constexpr(i) for i in range(11, 15))
GAINS, GAIN_BATCH, GAIN_HEAD = (tl.constexpr(i) for i in range(15, 18))
KEY_CHUNKS, VALUE_CHUNKS, CHUNKS, STORED = (tl.constexpr(i) for i in range(18, 22))
FIELDS = tl.constexpr(22)

# Columns of a chunk: the rate, first rows and numbers of its two groups, -1 for none.
BITS, ROW_0, ROW_1, GROUP_0, GROUP_1 = (tl.constexpr(i) for i in range(5))
CHUNK = tl.constexpr(5)


@triton.jit
def _slots(part, PLACES, b, h, t, seen):
    """Where tokens are, -1 if nowhere."""
    place = tl.load(part + SLOTS)
    if place < 0:
        slot = (tl.load(part + SLOT_START) + t).to(tl.int32)
    else:
        at = PLACES + place + b * tl.load(part + SLOT_BATCH) + h * tl.load(part + SLOT_HEAD)
        slot = tl.load(at + t, mask=seen, other=-1)
    return tl.where(seen, slot, -1)


@triton.jit
def _masked(x, BIAS, bias_batch, bias_head, bias_query, columns, first_column, b, h, slot, r, ROWS,
            Q_LEN: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Logits x (tokens, rows) with what the mask adds to them; -inf where nothing is seen."""
    seen = (slot >= 0)[:, None] & (r < ROWS)[None, :]
    if HAS_BIAS:
        column = slot - first_column
        seen = seen & ((column >= 0) & (column < columns))[:, None]
        head = h * (ROWS // Q_LEN) + r // Q_LEN
        at = BIAS + b * bias_batch + (head * bias_head + (r % Q_LEN) * bias_query)[None, :]
        x += tl.load(at + column[:, None], mask=seen, other=0.0)
        x = tl.where((x < -1e37) & (x > HIDDEN), -1e37, x)  # no mask's least number is infinite
    return tl.where(seen, x, HIDDEN)


@triton.jit
def _softcapped(x, cap):
    """cap tanh(x / cap), by the exponential."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
    y = cap * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def logits(
    PARTS, PLACES, TABLE, GAIN_VALUES, Q, SCALE, CONSTANT, PAGE_OF, page_batch, pages,
    n_parts, tiles,
    BIAS, bias_batch, bias_head, bias_query, columns, first_column, softcap,
    P, TOP, SUM, kv_heads, width,
    ROWS: tl.constexpr, Q_LEN: tl.constexpr, RP: tl.constexpr, NP: tl.constexpr,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Weights of one tile of tokens, relative to the tile's largest.

    Args:
        PARTS, PLACES: see above, and slots (int32). TABLE: see `code`. GAIN_VALUES: the 16 gains.
        Q, SCALE, CONSTANT: `queries.page_queries`: (batch kv_heads, pages, RP, width) fp16,
            (.., pages, RP) fp32 twice.
        PAGE_OF: (batch or 1, slots) int32.
        BIAS: (batch or 1, heads or 1, q_len, columns) fp32, added to logits.
        P: (batch kv_heads, tiles, RP, BN) fp16, weights times the gain of the value.
        TOP, SUM: (batch kv_heads, tiles, RP) fp32, the largest logit and the sum of weights.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // kv_heads, row % kv_heads
    part, first = PARTS, 0
    for i in range(1, n_parts):
        begin = tl.load(PARTS + i * FIELDS + TILE).to(tl.int32)
        if tile >= begin:
            part, first = PARTS + i * FIELDS, begin
    hp = tl.load(tl.load(part + HEAD_MAP).to(tl.pointer_type(tl.int32)) + h)
    r, t = tl.arange(0, RP), (tile - first) * BN + tl.arange(0, BN)
    out = row * tiles + tile
    if hp < 0:
        tl.store(TOP + out * RP + r, tl.full((RP,), HIDDEN, tl.float32))
        tl.store(SUM + out * RP + r, tl.zeros((RP,), tl.float32))
        return
    seen = t < tl.load(part + TOKENS)
    slot = _slots(part, PLACES, b, hp, t, seen)
    seen = slot >= 0
    gains = tl.load(part + GAINS).to(tl.pointer_type(tl.uint8)) + b * tl.load(part + GAIN_BATCH)
    gain = tl.load(gains + hp * tl.load(part + GAIN_HEAD) + t, mask=seen, other=0).to(tl.int32)
    key_gain = tl.load(GAIN_VALUES + (gain & 15))
    page = tl.load(PAGE_OF + b * page_batch + slot, mask=seen, other=-1)
    keys = tl.load(part + KEYS).to(tl.pointer_type(tl.uint8)) + b * tl.load(part + KEY_BATCH)
    stride = tl.load(part + KEY_TOKEN)
    chunks = tl.load(part + KEY_CHUNKS).to(tl.pointer_type(tl.int32))
    chunks += hp * tl.load(part + CHUNKS) * CHUNK
    pr, lane, half = tl.arange(0, NP * RP), tl.arange(0, 16), tl.arange(0, 2)
    x = tl.zeros((BN, RP), tl.float32)
    begin = tl.min(tl.where(seen, page, pages))
    end = tl.max(page) + 1
    while begin < end:  # of the tile's pages, NP at a time
        there = begin + pr // RP
        at = Q + ((row * pages + there) * RP + pr % RP) * width
        exists = (there < end)[None, :]
        dots = tl.zeros((BN, NP * RP), tl.float32)
        chunk = chunks
        bits = tl.load(chunk + BITS)
        while bits > 0:
            rows = tl.where(half == 0, tl.load(chunk + ROW_0), tl.load(chunk + ROW_1))
            group = tl.where(lane < 8, tl.load(chunk + GROUP_0), tl.load(chunk + GROUP_1))
            q = tl.load(
                at[None, :] + (group * 8 + lane % 8)[:, None],
                mask=exists & (group >= 0)[:, None], other=0.0,
            )  # fmt: skip
            k = codewords(keys, rows, stride, t, seen, bits, TABLE)
            dots = tl.dot(k, q, dots)
            chunk += CHUNK
            bits = tl.load(chunk + BITS)
        at = (row * pages + there) * RP + pr % RP
        scale = tl.load(SCALE + at, mask=there < end, other=0.0)
        constant = tl.load(CONSTANT + at, mask=there < end, other=0.0)
        dots = dots * scale[None, :] * key_gain[:, None] + constant[None, :]
        mine = page[:, None] == there[None, :]
        x += tl.sum(tl.reshape(tl.where(mine, dots, 0.0), (BN, NP, RP)), 1)
        begin += NP
    if HAS_CAP:
        x = _softcapped(x, softcap)
    x = _masked(x, BIAS, bias_batch, bias_head, bias_query, columns, first_column, b, h, slot, r,
                ROWS, Q_LEN, HAS_BIAS)  # fmt: skip
    x *= LOG2E
    top = tl.max(x, 0)
    p = tl.exp2(x - tl.where(top == HIDDEN, 0.0, top)[None, :])
    tl.store(TOP + out * RP + r, top)
    tl.store(SUM + out * RP + r, tl.sum(p, 0))
    value_gain = tl.load(GAIN_VALUES + (gain >> 4))
    at = P + (out * RP + r)[None, :] * BN + tl.arange(0, BN)[:, None]
    tl.store(at, (p * value_gain[:, None]).to(tl.float16))


@triton.jit
def values(
    PARTS, TABLE, WORK, P, TOP, SUM, OUT, LARGEST, MASS, kv_heads, tiles, splits, dim,
    RP: tl.constexpr, RV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums of weighted codewords: of some tiles of a part, and of two groups of coordinates.

    Args:
        WORK: (programs, 5) int32: part, split, first tile, last tile + 1, chunk.
        P, TOP, SUM: from `logits`.
        OUT: (batch kv_heads, splits, RP, dim) fp32, relative to the split's largest logit; not
            written where nothing is coded.
        LARGEST, MASS: (batch kv_heads, splits, RP) fp32, that logit and the sum of weights.
    """
    row, work = tl.program_id(0).to(tl.int64), WORK + tl.program_id(1) * 5
    b, h = row // kv_heads, row % kv_heads
    part = PARTS + tl.load(work) * FIELDS
    split, tile, stop = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    number = tl.load(work + 4)
    r, r_top = tl.arange(0, RV), tl.full((RV,), HIDDEN, tl.float32)
    spot = row * splits + split
    hp = tl.load(tl.load(part + HEAD_MAP).to(tl.pointer_type(tl.int32)) + h)
    chunk = tl.load(part + VALUE_CHUNKS).to(tl.pointer_type(tl.int32))
    chunk += (tl.maximum(hp, 0) * tl.load(part + CHUNKS) + number) * CHUNK
    bits = tl.load(chunk + BITS)
    acc, mass = tl.zeros((16, RV), tl.float32), tl.zeros((RV,), tl.float32)
    if hp >= 0:
        lane, half = tl.arange(0, 16), tl.arange(0, 2)
        rows = tl.where(half == 0, tl.load(chunk + ROW_0), tl.load(chunk + ROW_1))
        data = tl.load(part + VALUES).to(tl.pointer_type(tl.uint8))
        data += b * tl.load(part + VALUE_BATCH)
        stride, tokens = tl.load(part + VALUE_TOKEN), tl.load(part + TOKENS)
        first, n = tl.load(part + TILE).to(tl.int32), tl.arange(0, BN)
        for i in range(tile, stop):
            at = (row * tiles + i) * RP + r
            top = tl.load(TOP + at, mask=r < RP, other=HIDDEN)
            new = tl.maximum(r_top, top)
            safe = tl.where(new == HIDDEN, 0.0, new)
            decay, grow = tl.exp2(r_top - safe), tl.exp2(top - safe)
            r_top = new
            mass = mass * decay + tl.load(SUM + at, mask=r < RP, other=0.0) * grow
            if bits > 0:
                t = (i - first) * BN + n
                seen = t < tokens
                p = tl.load(P + at[None, :] * BN + n[:, None], mask=(r < RP)[None, :], other=0.0)
                v = codewords(data, rows, stride, t, seen, bits, TABLE)
                acc = acc * decay[None, :] + tl.dot(tl.trans(v), p) * grow[None, :]
        if bits > 0:
            group = tl.where(lane < 8, tl.load(chunk + GROUP_0), tl.load(chunk + GROUP_1))
            at = (spot * RP + r)[None, :] * dim + (group * 8 + coordinate(lane))[:, None]
            tl.store(OUT + at, acc, mask=(group >= 0)[:, None] & (r < RP)[None, :])
    if number == 0:
        tl.store(LARGEST + spot * RP + r, r_top, mask=r < RP)
        tl.store(MASS + spot * RP + r, mass, mask=r < RP)


@triton.jit
def exact(
    PARTS, PLACES, QUERY, BIAS, bias_batch, bias_head, bias_query, columns, first_column, softcap,
    OUT, TOP, SUM, kv_heads, n_parts, splits, dim, dim_v,
    ROWS: tl.constexpr, Q_LEN: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Attention to uncoded tokens; parts as above, without codes.

    Args:
        QUERY: (batch kv_heads, ROWS, dim) fp32, scaled.
        OUT: (batch kv_heads, splits, RP, dim_v) fp32, relative to TOP; TOP, SUM as in `logits`.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // kv_heads, row % kv_heads
    r, n, d, dv = tl.arange(0, RP), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    q = tl.load(
        QUERY + (row * ROWS + r[None, :]) * dim + d[:, None],
        mask=(r < ROWS)[None, :] & (d < dim)[:, None], other=0.0,
    )  # fmt: skip
    top = tl.full((RP,), HIDDEN, tl.float32)
    mass, acc = tl.zeros((RP,), tl.float32), tl.zeros((RP, DVP), tl.float32)
    for i in range(n_parts):
        part = PARTS + i * FIELDS
        hp = tl.load(tl.load(part + HEAD_MAP).to(tl.pointer_type(tl.int32)) + h)
        if hp >= 0:
            tokens = tl.load(part + TOKENS).to(tl.int32)
            keys = tl.load(part + KEYS).to(tl.pointer_type(DTYPE))
            keys += b * tl.load(part + KEY_BATCH) + hp * tl.load(part + KEY_HEAD)
            data = tl.load(part + VALUES).to(tl.pointer_type(DTYPE))
            data += b * tl.load(part + VALUE_BATCH) + hp * tl.load(part + VALUE_HEAD)
            k_token, v_token = tl.load(part + KEY_TOKEN), tl.load(part + VALUE_TOKEN)
            for first in range(split * BN, tokens, splits * BN):
                t = first + n
                slot = _slots(part, PLACES, b, hp, t, t < tokens)
                seen = slot >= 0
                k = tl.load(
                    keys + t[:, None] * k_token + d[None, :],
                    mask=seen[:, None] & (d < dim)[None, :], other=0.0,
                )  # fmt: skip
                x = tl.dot(k.to(tl.float32), q, input_precision="ieee")
                if HAS_CAP:
                    x = _softcapped(x, softcap)
                x = _masked(x, BIAS, bias_batch, bias_head, bias_query, columns, first_column, b,
                            h, slot, r, ROWS, Q_LEN, HAS_BIAS) * LOG2E  # fmt: skip
                new = tl.maximum(top, tl.max(x, 0))
                safe = tl.where(new == HIDDEN, 0.0, new)
                decay, p = tl.exp2(top - safe), tl.exp2(x - safe[None, :])
                v = tl.load(
                    data + t[:, None] * v_token + dv[None, :],
                    mask=seen[:, None] & (dv < dim_v)[None, :], other=0.0,
                )  # fmt: skip
                weighed = tl.dot(tl.trans(p), v.to(tl.float32), input_precision="ieee")
                acc, mass = acc * decay[:, None] + weighed, mass * decay + tl.sum(p, 0)
                top = new
    spot = row * splits + split
    tl.store(TOP + spot * RP + r, top)
    tl.store(SUM + spot * RP + r, mass)
    at = (spot * RP + r)[:, None] * dim_v + dv[None, :]
    tl.store(OUT + at, acc, mask=(dv < dim_v)[None, :])
