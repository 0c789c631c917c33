"""Queries in the code space of every page of keys, and where tokens are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_queries(
    QUERY, TURNS, turns_batch, held, frequencies, ROTARY, INVERSE, inverse_head,
    SCALE, scale_batch, scale_head, scale_dim, MEAN, mean_batch, mean_head,
    OUT, SIZE, CONSTANT, kv_heads, pages, dim, width,
    ROWS: tl.constexpr, RP: tl.constexpr, PB: tl.constexpr, WP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """R(page)^T q, through the transpose of keys = mean + scale (inverse @ codes).

    Args:
        QUERY: (batch kv_heads, ROWS, dim) fp32, scaled.
        TURNS, ROTARY: see `nexusquant.pages.Pages`; `held` pages with padding.
        OUT: (batch kv_heads, pages, RP, width) fp16, of largest size 256, in the order of
            `code.coordinate`.
        SIZE: (batch kv_heads, pages, RP) fp32, what to multiply them with.
        CONSTANT: likewise, what to add to their products with codes.
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PB
    b, h = row // kv_heads, row % kv_heads
    m, w = tl.arange(0, PB * RP), tl.arange(0, WP)
    page, r = first + m // RP, m % RP
    real = (page < pages) & (r < ROWS)
    query = QUERY + (row * ROWS + r) * dim
    turns = TURNS + b * turns_batch + page
    acc, constant = tl.zeros((PB * RP, WP), tl.float32), tl.zeros((PB * RP,), tl.float32)
    for begin in range(0, dim, 16):
        i = begin + tl.arange(0, 16)
        inside = i < dim
        frequency = tl.load(ROTARY + 3 * i, mask=inside, other=-1)
        partner = tl.load(ROTARY + 3 * i + 1, mask=inside, other=0)
        sign = tl.load(ROTARY + 3 * i + 2, mask=inside, other=0).to(tl.float32)
        seen = real[:, None] & inside[None, :]
        turned = seen & (frequency >= 0)[None, :]
        x = tl.load(query[:, None] + i[None, :], mask=seen, other=0.0)
        other = tl.load(query[:, None] + partner[None, :], mask=turned, other=0.0)
        at = turns[:, None] + (frequency * held)[None, :]
        cos = tl.load(at, mask=turned, other=1.0)
        sin = tl.load(at + frequencies * held, mask=turned, other=0.0)
        x = x * cos - sign[None, :] * other * sin
        if HAS_MEAN:
            at = MEAN + b * mean_batch + h * mean_head + i
            mean = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            constant += tl.sum(x * mean[None, :], 1)
        if HAS_SCALE:
            at = SCALE + b * scale_batch + h * scale_head + i * scale_dim
            x *= tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        y = tl.load(
            INVERSE + h * inverse_head + i[:, None] * dim + w[None, :],
            mask=inside[:, None] & (w < width)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, y, acc, input_precision="tf32x3")
    size = tl.max(tl.abs(acc), 1) * (1.0 / 256)
    size = tl.where(size == 0.0, 1.0, size)
    at = (row * pages + page) * RP + r
    kept = page < pages
    place = w // 8 * 8 + w % 4 * 2 + w % 8 // 4  # inverse of `coordinate`
    tl.store(OUT + at[:, None] * width + place[None, :], (acc / size[:, None]).to(tl.float16),
             mask=kept[:, None] & (w < width)[None, :])  # fmt: skip
    tl.store(SIZE + at, size, mask=kept)
    tl.store(CONSTANT + at, constant, mask=kept)


@triton.jit
def positions_of_gaps(GAPS, OUT, count, start, BLOCK: tl.constexpr):
    """Slots from gaps between them (`nexusquant.slots`): (rows, count) to int32."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for i in range(block):
        before += tl.load(GAPS + row * count + i * BLOCK + n).to(tl.int32)
    at = block * BLOCK + n
    gap = tl.load(GAPS + row * count + at, mask=at < count, other=0).to(tl.int32)
    slot = start - 1 + tl.sum(before) + tl.cumsum(gap, 0)
    tl.store(OUT + row * count + at, tl.where(gap == 0, -1, slot), mask=at < count)


@triton.jit
def positions_of_bits(BITMAP, OUT, count, start, width, BLOCK: tl.constexpr):
    """Slots from a bitmap of `width` bytes per row: (rows, count) int32, -1 where there is none."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for i in range(block):  # earlier blocks are whole
        byte = tl.load(BITMAP + row * width + (i * BLOCK + n) // 8).to(tl.int32)
        before += (byte >> (n % 8)) & 1
    at = block * BLOCK + n
    byte = tl.load(BITMAP + row * width + at // 8, mask=at < 8 * width, other=0).to(tl.int32)
    bit = (byte >> (at % 8)) & 1
    entry = tl.sum(before) + tl.cumsum(bit, 0) - 1
    tl.store(OUT + row * count + entry, start + at, mask=bit > 0)
    if (block + 1) * BLOCK >= 8 * width:
        for i in range(tl.max(entry) + 1, count, BLOCK):
            tl.store(OUT + row * count + i + n, tl.full((BLOCK,), -1, tl.int32), mask=i + n < count)
