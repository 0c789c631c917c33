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
from numba import njit, prange

from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu.memory import get_float, get_int, get_number, keep, load, put_float
from nexusquant.kernels.cpu.queries import PAGES, page_queries, query_basis
from nexusquant.kernels.cpu.simd import LANES, total
from nexusquant.kernels.cpu.sources import SOURCES
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

f32 = np.float32


@njit
def _prepare(call, bias, key, row, R, parts, exacts, where, basis, shift, tops, sums, output):
    """Of one KV head: where its tokens are, its queries' basis, and attention to uncoded tokens."""
    b, h = row // call.kv_heads, row % call.kv_heads
    for i in range(len(parts)):
        hp = get_int(parts[i, at.HEAD_MAP], h)
        if hp >= 0:
            positions(parts[i], b, hp, where + 4 * parts[i, at.ENTRY])
    if len(parts):
        query_basis(call, key, row, h, R, basis, shift)
    space = np.empty(512 + R * TILE, np.float32)
    for i in range(len(exacts)):
        hp = get_int(exacts[i, at.HEAD_MAP], h)
        if hp >= 0:
            spots = np.empty(exacts[i, at.TOKENS], np.int32)
            positions(exacts[i], b, hp, spots.ctypes.data)
            exact_part(
                call, bias, exacts[i], b, h, hp, R, call.query + 4 * row * R * call.dim,
                spots.ctypes.data, tops, sums, output, space.ctypes.data,
            )  # fmt: skip
            keep(spots)
    keep(space)


@njit
def _split(call, bias, row, split, rows, parts, where, basis, shift, tops, sums, output):
    """Attention of one KV head to the coded tokens of some pages, values in code space."""
    R, width, b, h = len(rows), call.width, row // call.kv_heads, row % call.kv_heads
    page_of = call.page_of + 4 * b * call.page_of_batch
    blocks = (call.pages + PAGES - 1) // PAGES
    first, stop = blocks * split // call.splits, blocks * (split + 1) // call.splits
    held_queries = np.empty(PAGES * R * width + R * LANES, np.float32)
    queries = held_queries.ctypes.data
    constants = queries + 4 * PAGES * R * width
    held_vectors = np.empty(max(call.dim * LANES, 8 * TILE) + R * TILE, np.float32)
    vectors = held_vectors.ctypes.data
    logits = vectors + 4 * max(call.dim * LANES, 8 * TILE)
    held_sums = np.zeros(call.dim_v * R * LANES, np.float32)
    summed = held_sums.ctypes.data
    begins, heads = np.zeros(len(parts), np.int64), np.empty(len(parts), np.int64)
    for i in range(len(parts)):
        heads[i] = get_int(parts[i, at.HEAD_MAP], h)
        if heads[i] >= 0 and first:
            mine = where + 4 * parts[i, at.ENTRY]
            begins[i] = first_on_page(mine, parts[i, at.TOKENS], page_of, first * PAGES)
    for page in range(first * PAGES, stop * PAGES, PAGES):
        page_queries(call, b, page, R, basis, shift, queries, constants)
        for i in range(len(parts)):
            if heads[i] < 0:
                continue
            part, hp, mine = parts[i], heads[i], where + 4 * parts[i, at.ENTRY]
            end = part[at.TOKENS]
            if page + PAGES < call.pages:
                end = first_on_page(mine, end, page_of, page + PAGES)
            for t in range(begins[i], end, TILE):
                n = min(TILE, end - t)
                blocks_here = (n + LANES - 1) // LANES
                tile(
                    rows, call.codes, call.gains, part, b, hp, mine, t, n, page_of, page,
                    queries, constants, width, vectors, logits,
                )  # fmt: skip
                if call.softcap > 0:
                    soften(R, logits, blocks_here, call.softcap)
                add_bias(bias, b, h, R, call.rows, call.q_len, mine, t, n, logits)
                weigh(
                    R, logits, blocks_here, call.gains, part, b, hp, t, tops, sums, summed,
                    call.dim_v,
                )  # fmt: skip
                add_values(rows, call.codes, part, b, hp, t, blocks_here, logits, vectors, summed)
            begins[i] = end
    for d in range(call.dim_v):
        for r in range(R):
            put_float(output, r * call.dim_v + d, total(load(summed, LANES * (d * R + r))))
    keep(held_queries)
    keep(held_vectors)
    keep(held_sums)


@njit
def _merge(call, value, row, R, tops, sums, sent, output, lse):
    """All splits of one KV head and its uncoded tokens together, out of code space."""
    h, dim = row % call.kv_heads, call.dim_v
    inverse = value.inverse + (0 if value.heads == 1 else 4 * h * dim * dim)
    code = np.empty(dim, np.float32)
    for r in range(R):
        best = HIDDEN
        if call.sinks:
            query = min(r, call.rows - 1) // call.q_len
            best = get_float(call.sinks, h * (call.rows // call.q_len) + query)
        sink = best
        for split in range(call.splits + 1):
            best = max(best, tops[split, r])
        mass = f32(0)
        if sink > HIDDEN:
            mass = f32(math.exp(sink - best))
        coded, own = f32(0), f32(0)
        code[:] = 0
        for split in range(call.splits + 1):
            if tops[split, r] == HIDDEN and sums[split, r] == 0:
                continue
            weight = f32(math.exp(tops[split, r] - best))
            mass += weight * sums[split, r]
            if split == call.splits:
                own = weight
                continue
            coded += weight * sums[split, r]
            for d in range(dim):
                code[d] += weight * sent[split, r, d]
        for i in range(dim):
            x = own * sent[call.splits, r, i] if own != 0 else f32(0)
            if coded != 0:
                y = f32(0)
                for d in range(dim):
                    y += get_float(inverse, i * dim + d) * code[d]
                if value.scale:
                    at_scale = row * value.scale_row + (i if value.scale_row > 1 else 0)
                    y *= get_number(value.scale, value.scale_kind, at_scale)
                if value.mean:
                    y += coded * get_number(value.mean, value.mean_kind, row * value.mean_row + i)
                x += y
            put_float(output, r * dim + i, x / mass if mass != 0 else f32(0))
        put_float(lse, r, best + f32(math.log(mass)) if mass != 0 else HIDDEN)


@njit(parallel=True)
def _prepare_all(call, bias, key, R, parts, exacts, where, basis, shift, tops, sums, sent):
    last = call.splits
    for row in prange(call.batch * call.kv_heads):
        _prepare(
            call, bias, key, row, R, parts, exacts, where[row].ctypes.data,
            basis[row].ctypes.data, shift[row].ctypes.data, tops[row, last].ctypes.data,
            sums[row, last].ctypes.data, sent[row, last].ctypes.data,
        )  # fmt: skip


@njit(parallel=True)
def _split_all(call, bias, rows, parts, where, basis, shift, tops, sums, sent):
    for task in prange(call.batch * call.kv_heads * call.splits):
        row, split = task // call.splits, task % call.splits
        _split(
            call, bias, row, split, rows, parts, where[row].ctypes.data,
            basis[row].ctypes.data, shift[row].ctypes.data, tops[row, split].ctypes.data,
            sums[row, split].ctypes.data, sent[row, split].ctypes.data,
        )  # fmt: skip


@njit(parallel=True)
def _merge_all(call, value, R, tops, sums, sent, output, lse):
    for row in prange(call.batch * call.kv_heads):
        _merge(
            call, value, row, R, tops[row], sums[row], sent[row],
            output + 4 * row * R * call.dim_v, lse + 4 * row * R,
        )  # fmt: skip


@njit
def _attend(rows, call, bias, key, value, parts, exacts, output, lse):
    """Attention of all queries to all parts; see `arguments`.

    Args:
        rows: a tuple with as many members as there are queries per KV head, real or not.
        parts, exacts: (n, FIELDS) int64, of coded and of uncoded tokens.
        output, lse: addresses of (batch, kv_heads, rows, dim_v) and (batch, kv_heads, rows) fp32.
    """
    R, heads, kinds = len(rows), call.batch * call.kv_heads, 2 * call.columns + 1
    where = np.empty((heads, max(call.entries, 1)), np.int32)
    basis = np.empty((heads, kinds * R * call.width), np.float32)
    shift = np.empty((heads, kinds * R), np.float32)
    # Of every split, and of the uncoded tokens last.
    tops = np.full((heads, call.splits + 1, R), HIDDEN, np.float32)
    sums = np.zeros((heads, call.splits + 1, R), np.float32)
    sent = np.zeros((heads, call.splits + 1, R, call.dim_v), np.float32)
    _prepare_all(call, bias, key, R, parts, exacts, where, basis, shift, tops, sums, sent)
    if len(parts):
        _split_all(call, bias, rows, parts, where, basis, shift, tops, sums, sent)
    _merge_all(call, value, R, tops, sums, sent, output, lse)


def _kept(sources):
    @njit(cache=True, nogil=True)
    def attend(rows, call, bias, key, value, parts, exacts, output, lse):
        _ = sources
        _attend(rows, call, bias, key, value, parts, exacts, output, lse)

    return attend


attend = _kept(SOURCES)
