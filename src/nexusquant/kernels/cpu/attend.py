"""Attention of few queries over codes, 16 tokens at a time, without ever holding keys or values.

Queries visit the keys' code space instead: for a page of keys, q_page = T^-T R(page)^T q, and as
R is linear in cosines and sines, all pages together are one product of [cos sin 1] with a small
matrix per query (`queries`). Logits are then dot products with codewords. Probabilities
weigh codewords of values, summed in code space per lane; the sum leaves it once. Softmax is
online (Milakov and Gimelshein 2018, arXiv 1805.02867), splits are merged by their log-sum-exp.
"""

from __future__ import annotations

import math

import numpy as np

from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu.compiled import Task
from nexusquant.kernels.cpu.memory import (
    float_of,
    get_float,
    get_int,
    get_long,
    get_number,
    keep,
    load,
    put_float,
    put_int,
    store,
)
from nexusquant.kernels.cpu.queries import PAGES, page_queries, query_basis
from nexusquant.kernels.cpu.simd import LANES, splat, total
from nexusquant.kernels.cpu.tokens import (
    HIDDEN,
    TILE,
    add_bias,
    add_values,
    exact_part,
    first_on_page,
    positions,
    soften,
    tile,
    weigh,
)  # fmt: skip

f32, i32 = np.float32, np.int32
ROWS = (1, 2, 3, 4, 8, 16)
"""Queries per KV head, times their number, that attention is compiled for; others are filled up.
More are better served by decoding blocks once and multiplying matrices."""
_LINE = 8 * at.FIELDS


def filled(rows: int) -> int | None:
    """How many `rows` queries are filled up to; None: they are too many."""
    return next((n for n in ROWS if n >= rows), None)


def _prepare(arguments, row):
    """Of one KV head: where its tokens are, its queries' basis, and attention to uncoded tokens."""
    call, bias, key = at.read_call(arguments), at.read_bias(arguments), at.read_key(arguments)
    work = at.read_work(arguments)
    R, b, h = work.held, row // call.kv_heads, row % call.kv_heads
    where = work.where + 4 * row * call.entries
    for i in range(work.coded):
        part = work.parts + _LINE * i
        hp = get_int(get_long(part, at.HEAD_MAP), h)
        if hp >= 0:
            positions(part, b, hp, where + 4 * get_long(part, at.ENTRY))
    if work.coded:
        kinds = (2 * call.columns + 1) * R
        basis, shift = work.basis + 4 * row * kinds * call.width, work.shift + 4 * row * kinds
        query_basis(call, key, row, h, R, basis, shift)
    last = row * (call.splits + 1) + call.splits
    tops, sums = work.tops + 4 * last * R, work.sums + 4 * last * R
    output = work.sent + 4 * last * R * call.dim_v
    for r in range(R):
        put_float(tops, r, HIDDEN)
        put_float(sums, r, f32(0))
    for i in range(R * call.dim_v):
        put_float(output, i, f32(0))
    most = 0
    for i in range(work.uncoded):
        most = max(most, get_long(work.exacts + _LINE * i, at.TOKENS))
    space = np.empty(512 + R * TILE + most, np.float32)
    vector = space.ctypes.data
    spots = vector + 4 * (512 + R * TILE)
    for i in range(work.uncoded):
        part = work.exacts + _LINE * i
        hp = get_int(get_long(part, at.HEAD_MAP), h)
        if hp >= 0:
            positions(part, b, hp, spots)
            query = call.query + 4 * row * R * call.dim
            exact_part(call, bias, part, b, h, hp, R, query, spots, tops, sums, output, vector)
    keep(space)


def _split_of(rows):
    """Attention of one KV head to the coded tokens of some pages, values in code space; `rows` is
    a tuple with as many members as there are queries, real or not."""

    def split(arguments, task):
        call, bias, work = (
            at.read_call(arguments), at.read_bias(arguments), at.read_work(arguments),
        )  # fmt: skip
        row, split = task // call.splits, task % call.splits
        R, width, b, h = len(rows), call.width, row // call.kv_heads, row % call.kv_heads
        kinds, own = (2 * call.columns + 1) * R, row * (call.splits + 1) + split
        where = work.where + 4 * row * call.entries
        basis, shift = work.basis + 4 * row * kinds * width, work.shift + 4 * row * kinds
        tops, sums = work.tops + 4 * own * R, work.sums + 4 * own * R
        output, softcap = work.sent + 4 * own * R * call.dim_v, float_of(call.softcap)
        page_of = call.page_of + 4 * b * call.page_of_batch
        blocks = (call.pages + PAGES - 1) // PAGES
        first, stop = blocks * split // call.splits, blocks * (split + 1) // call.splits
        held_queries, held_vectors = PAGES * R * width + R * LANES, max(call.dim * LANES, 8 * TILE)
        space = np.empty(
            held_queries + held_vectors + R * TILE + call.dim_v * R * LANES + 2 * work.coded,
            np.float32,
        )
        queries = space.ctypes.data
        constants, vectors = queries + 4 * PAGES * R * width, queries + 4 * held_queries
        logits = vectors + 4 * held_vectors
        summed = logits + 4 * R * TILE
        begins = summed + 4 * call.dim_v * R * LANES
        heads = begins + 4 * work.coded
        for r in range(R):
            put_float(tops, r, HIDDEN)
            put_float(sums, r, f32(0))
        for i in range(call.dim_v * R):
            store(summed, LANES * i, splat(f32(0)))
        for i in range(work.coded):
            part = work.parts + _LINE * i
            hp, begin = get_int(get_long(part, at.HEAD_MAP), h), 0
            if hp >= 0 and first:
                mine = where + 4 * get_long(part, at.ENTRY)
                begin = first_on_page(mine, get_long(part, at.TOKENS), page_of, first * PAGES)
            put_int(heads, i, hp)
            put_int(begins, i, i32(begin))
        for page in range(first * PAGES, stop * PAGES, PAGES):
            page_queries(call, b, page, R, basis, shift, queries, constants)
            for i in range(work.coded):
                hp = get_int(heads, i)
                if hp < 0:
                    continue
                part = work.parts + _LINE * i
                mine, end = where + 4 * get_long(part, at.ENTRY), get_long(part, at.TOKENS)
                if page + PAGES < call.pages:
                    end = first_on_page(mine, end, page_of, page + PAGES)
                for t in range(get_int(begins, i), end, TILE):
                    n = min(TILE, end - t)
                    blocks_here = (n + LANES - 1) // LANES
                    tile(
                        rows, call.codes, call.gains, part, b, hp, mine, t, n, page_of, page,
                        queries, constants, width, vectors, logits,
                    )  # fmt: skip
                    if softcap > 0:
                        soften(R, logits, blocks_here, softcap)
                    add_bias(bias, b, h, R, call.rows, call.q_len, mine, t, n, logits)
                    weigh(
                        R, logits, blocks_here, call.gains, part, b, hp, t, tops, sums, summed,
                        call.dim_v,
                    )  # fmt: skip
                    add_values(
                        rows, call.codes, part, b, hp, t, blocks_here, logits, vectors, summed
                    )
                put_int(begins, i, i32(end))
        for d in range(call.dim_v):
            for r in range(R):
                put_float(output, r * call.dim_v + d, total(load(summed, LANES * (d * R + r))))
        keep(space)

    return split


def _merge(arguments, row):
    """All splits of one KV head and its uncoded tokens together, out of code space."""
    call, value, work = at.read_call(arguments), at.read_value(arguments), at.read_work(arguments)
    R, h, dim = work.held, row % call.kv_heads, call.dim_v
    splits = call.splits if work.coded else 0
    inverse = value.inverse + (0 if value.heads == 1 else 4 * h * dim * dim)
    start = row * (call.splits + 1)
    last = start + call.splits
    space = np.empty(dim, np.float32)
    code = space.ctypes.data
    for r in range(R):
        best = HIDDEN
        if call.sinks:
            query = min(r, call.rows - 1) // call.q_len
            best = get_float(call.sinks, h * (call.rows // call.q_len) + query)
        sink = best
        best = max(best, get_float(work.tops, last * R + r))
        for own in range(start, start + splits):
            best = max(best, get_float(work.tops, own * R + r))
        mass = f32(0)
        if sink > HIDDEN:
            mass = f32(math.exp(sink - best))
        coded, weight = f32(0), f32(0)
        for d in range(dim):
            put_float(code, d, f32(0))
        for own in range(start, start + splits):
            top, part = get_float(work.tops, own * R + r), get_float(work.sums, own * R + r)
            if top == HIDDEN and part == 0:
                continue
            share = f32(math.exp(top - best))
            coded += share * part
            for d in range(dim):
                sent = get_float(work.sent, (own * R + r) * dim + d)
                put_float(code, d, get_float(code, d) + share * sent)
        mass += coded
        top, part = get_float(work.tops, last * R + r), get_float(work.sums, last * R + r)
        if not (top == HIDDEN and part == 0):
            weight = f32(math.exp(top - best))
            mass += weight * part
        for i in range(dim):
            x = f32(0)
            if weight != 0:
                x = weight * get_float(work.sent, (last * R + r) * dim + i)
            if coded != 0:
                y = f32(0)
                for d in range(dim):
                    y += get_float(inverse, i * dim + d) * get_float(code, d)
                if value.scale:
                    at_scale = row * value.scale_row + (i if value.scale_row > 1 else 0)
                    y *= get_number(value.scale, value.scale_kind, at_scale)
                if value.mean:
                    y += coded * get_number(value.mean, value.mean_kind, row * value.mean_row + i)
                x += y
            put_float(work.output, (row * R + r) * dim + i, x / mass if mass != 0 else f32(0))
        put_float(work.lse, row * R + r, best + f32(math.log(mass)) if mass != 0 else HIDDEN)
    keep(space)


prepare, merge = Task(_prepare, "prepare"), Task(_merge, "merge")
splits = {n: Task(_split_of((0,) * n), f"attend-{n}") for n in ROWS}
