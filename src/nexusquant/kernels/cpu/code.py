"""Codewords of 16 tokens at a time: the nearest one of a group, its word, and back (`math.e8`)."""

from __future__ import annotations

import numpy as np

from nexusquant.kernels.cpu.compiled import inner
from nexusquant.kernels.cpu.memory import (
    get_float,
    load,
    load_bytes,
    load_some_bytes,
    lookup,
    store,
    store_bytes,
    store_some_bytes,
)
from nexusquant.kernels.cpu.simd import choose, fma, splat, to_float, to_int

f32, i32 = np.float32, np.int32
STRIDE = 3072
"""Floats per rate in a code table: 4 coefficients, the largest level, its price, bins per unit, and
from 512 on the thresholds of either coset, 256 apart. From 1024 on, per coset and bin, the number
of thresholds below it: `BINS` bins from minus to plus the largest level have one at most."""
REACH, PRICE, PER_UNIT, EDGES, COSET, STARTS, BINS = 4, 5, 6, 512, 256, 1024, 1024
_FAR = f32(1e18)


@inner
def _level(code, v):
    """Levels at odd numbers v, from 1 - 2^(b+1) to 2^(b+1) - 1."""
    s = v * v
    inner = fma(s, splat(get_float(code, 3)), splat(get_float(code, 2)))
    inner = fma(s, fma(s, inner, splat(get_float(code, 1))), splat(get_float(code, 0)))
    return v * inner


@inner
def _nearest(code, bits, coset, x):
    """How many thresholds of the coset lie below x."""
    edges = code + 4 * (EDGES + COSET * coset)
    n = splat(i32(0))
    if bits <= 4:
        for k in range((1 << bits) - 1):
            n = n + choose(x > splat(get_float(edges, k)), splat(i32(1)), splat(i32(0)))
    else:
        at = (x + splat(get_float(code, REACH))) * splat(get_float(code, PER_UNIT))
        at = choose(at > splat(f32(0)), at, splat(f32(0)))  # NaN, too
        at = choose(at < splat(f32(BINS - 1)), at, splat(f32(BINS - 1)))
        n = to_int(lookup(code + 4 * (STARTS + BINS * coset), to_int(at)))
        n = n + choose(x > lookup(edges, n), splat(i32(1)), splat(i32(0)))
    return n


@inner
def _nearest_of_coset(code, bits, coset, x, stride):
    """Fields of the nearest even-sum word, 8 coordinates at x + 4 stride i.

    Returns squared error, low fields, high fields (not yet chained).
    """
    a = min(bits, 4)
    low, high = splat(i32((1 << a) - 1)), splat(i32(a))
    base, last = splat(i32(2 * coset + 1 - (2 << bits))), splat(i32((1 << bits) - 1))
    two, four = splat(i32(2)), splat(f32(4))
    cost, least = splat(f32(0)), splat(_FAR)
    parity = words = rest = patch = patch_rest = splat(i32(0))
    for i in range(8):
        value = load(x, stride * i)
        n = _nearest(code, bits, coset, value)
        v = to_float((n << two) + base)
        error = value - _level(code, v)
        error = error * error
        down, up = value - _level(code, v - four), value - _level(code, v + four)
        down = choose(n == splat(i32(0)), splat(_FAR), down * down)
        up = choose(n == last, splat(_FAR), up * up)
        other = choose(down < up, n - splat(i32(1)), n + splat(i32(1)))
        extra = choose(down < up, down, up) - error
        at, changed = splat(i32(a * i)), n ^ other
        words = words | ((n & low) << at)
        better = extra < least
        patch = choose(better, (changed & low) << at, patch)
        if bits > 4:
            at = splat(i32((bits - 4) * i))
            rest = rest | ((n >> high) << at)
            patch_rest = choose(better, (changed >> high) << at, patch_rest)
        least = choose(better, extra, least)
        cost, parity = cost + error, parity ^ n
    odd = (parity & splat(i32(1))) == splat(i32(1))
    cost = choose(odd, cost + least, cost)
    return cost, choose(odd, words ^ patch, words), choose(odd, rest ^ patch_rest, rest)


@inner
def encode_group(code, bits, lowest, x, stride, rows, tokens, at, full, lanes):
    """The codewords of 16 tokens' groups of 8 coordinates, at x + 4 (stride i + token).

    Args:
        code: address of the rate's table.
        lowest: mask of the lowest bit of all fields of a word (int32).
        rows, tokens, at: byte k goes to rows + k tokens + at.
        full, lanes: whether all 16 tokens exist, and which.
    """
    even, words, rest = _nearest_of_coset(code, bits, 0, x, stride)
    odd, odd_words, odd_rest = _nearest_of_coset(code, bits, 1, x, stride)
    coset = odd < even
    words, rest = choose(coset, odd_words, words), choose(coset, odd_rest, rest)
    a = min(bits, 4)
    chain = words & splat(lowest)
    chain = chain ^ (chain >> splat(i32(a)))
    chain = chain ^ (chain >> splat(i32(2 * a)))
    chain = chain ^ (chain >> splat(i32(4 * a)))
    words = (words & splat(i32(~lowest))) | chain
    words = choose(coset, words | splat(i32(1)), words)
    for k in range(bits):
        byte = words >> splat(i32(8 * k)) if k < 4 else rest >> splat(i32(8 * (k - 4)))
        if full:
            store_bytes(rows, k * tokens + at, byte)
        else:
            store_some_bytes(rows, k * tokens + at, byte, lanes)


@inner
def _bytes(rows, at, full, lanes):
    return load_bytes(rows, at) if full else load_some_bytes(rows, at, lanes)


@inner
def decode_group(code, bits, lowest, rows, tokens, at, full, lanes, out, stride):
    """Inverse of `encode_group`: coordinate i of 16 tokens to out + 4 stride i."""
    a = min(bits, 4)
    word, rest = _bytes(rows, at, full, lanes), splat(i32(0))
    for k in range(1, bits):
        byte = _bytes(rows, k * tokens + at, full, lanes)
        if k < 4:
            word = word | (byte << splat(i32(8 * k)))
        else:
            rest = rest | (byte << splat(i32(8 * (k - 4))))
    base = ((word & splat(i32(1))) << splat(i32(1))) + splat(i32(1 - (2 << bits)))
    word = word & splat(i32(-2))
    word = word ^ ((word & splat(i32(lowest & ~1))) >> splat(i32(a)))
    low, high, two = splat(i32((1 << a) - 1)), splat(i32((1 << (bits - a)) - 1)), splat(i32(2))
    for i in range(8):
        n = (word >> splat(i32(a * i))) & low
        if bits > 4:
            n = n | (((rest >> splat(i32((bits - 4) * i))) & high) << splat(i32(4)))
        store(out, stride * i, _level(code, to_float((n << two) + base)))
