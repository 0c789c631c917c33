"""Codewords in Triton: two groups of 8 coordinates, for a tile of tokens at a time (`math.e8`)."""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest bits of fields 1 to 7, and the exponent of 2^(7 - bits), by rate.
_CHAINED_1, _BASE_1 = tl.constexpr(0xFE), tl.constexpr(0x5400)
_CHAINED_2, _BASE_2 = tl.constexpr(0x5554), tl.constexpr(0x5000)
_CHAINED_3, _BASE_3 = tl.constexpr(0o11111110), tl.constexpr(0x4C00)
_CHAINED_4, _BASE_4 = tl.constexpr(0x11111110), tl.constexpr(0x4800)


@triton.jit
def coordinate(lane):
    """Which of a group's coordinates stands where: 0 4 1 5 2 6 3 7, as pairs are decoded."""
    return (lane % 2) * 4 + lane % 8 // 2


@triton.jit
def codewords(rows, first, stride, t, seen, bits, table, dtype: tl.constexpr = tl.float16):
    """(tokens, 16) of a dtype: codewords of two groups, in the order of `coordinate`.

    Args:
        rows: uint8 pointer to the first row of bytes; `stride` bytes lie between rows.
        first: (2,) int32, the first row of either group; -1 for none.
        t, seen: (tokens,) columns, and whether they exist.
        bits: the rate of both groups.
        table: fp32 pointer to the four coefficients of every rate's levels, from rate 0.
    """
    c = table + 4 * bits
    c0, c1 = tl.load(c).to(dtype), tl.load(c + 1).to(dtype)
    c2, c3 = tl.load(c + 2).to(dtype), tl.load(c + 3).to(dtype)
    at = rows + tl.maximum(first, 0).to(tl.int64)[None, :] * stride + t[:, None]
    seen = seen[:, None] & (first >= 0)[None, :]
    if bits == 1:
        word = _word(at, stride, seen, 1)
        x = _few(word, 1, _CHAINED_1, _BASE_1, c0, c1, c2, c3)
    elif bits == 2:
        word = _word(at, stride, seen, 2)
        x = _few(word, 2, _CHAINED_2, _BASE_2, c0, c1, c2, c3)
    elif bits == 3:
        word = _word(at, stride, seen, 3)
        x = _few(word, 3, _CHAINED_3, _BASE_3, c0, c1, c2, c3)
    else:
        word = _word(at, stride, seen, 4)
        if bits == 4:
            x = _few(word, 4, _CHAINED_4, _BASE_4, c0, c1, c2, c3)
        else:
            rest = tl.zeros_like(word)
            for k in range(4, bits):
                byte = tl.load(at + k * stride, mask=seen, other=0).to(tl.int32)
                rest = rest | (byte << (8 * (k - 4)))
            x = _many(word, rest, bits, c0, c1, c2, c3)
    return x


@triton.jit
def _word(at, stride, seen, count: tl.constexpr):
    """`count` bytes, little-endian."""
    word = tl.load(at, mask=seen, other=0).to(tl.int32)
    for k in tl.static_range(1, count):
        word = word | (tl.load(at + k * stride, mask=seen, other=0).to(tl.int32) << (8 * k))
    return word


@triton.jit
def _level(t, bits: tl.constexpr, c0, c1, c2, c3):
    if bits == 1:  # four equally spaced levels
        x = t * c0
    else:
        s = t * t
        x = t * (c0 + s * (c1 + s * (c2 + s * c3)))
    return x


@triton.jit
def _halves(x):
    """The two fp16 numbers in every int32."""
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _pair(n, shift: tl.constexpr, bits: tl.constexpr, base: tl.constexpr, offset, c0, c1, c2, c3):
    """Coordinates i and i + 4, from fields that begin at bits 4 - shift and 20 - shift."""
    mask: tl.constexpr = 0x00100010 * ((1 << bits) - 1)
    moved = n << shift if shift >= 0 else n >> -shift
    low, high = _halves((moved & mask) | (base * 0x10001))
    low = _level((low + offset).to(c0.dtype), bits, c0, c1, c2, c3)
    return low, _level((high + offset).to(c0.dtype), bits, c0, c1, c2, c3)


@triton.jit
def _few(word, bits: tl.constexpr, chained: tl.constexpr, base: tl.constexpr, c0, c1, c2, c3):
    """Of 1 to 4 bits. Fields are ORed into the mantissa of fp16, which spares conversions.

    At bits 4 and up of fp16 2^(7 - bits), field n counts n / 2^(bits - 1), and the coset half of
    that. What remains to t (`math.e8`) is a constant; all of it is exact.
    """
    unit: tl.constexpr = 2.0 ** (1 - bits)
    middle: tl.constexpr = 128.0 * unit + 1.0 - 0.25 * unit
    coset, _ = _halves(((word & 1) << 3) | base)
    offset = coset - middle
    n = (word & -2) ^ ((word & chained) >> bits)
    if bits < 4:  # fields 4 to 7 to the upper half
        half: tl.constexpr = (1 << (4 * bits)) - 1
        n = (n & half) | ((n << (16 - 4 * bits)) & (half << 16))
    x0, x4 = _pair(n, 4, bits, base, offset, c0, c1, c2, c3)
    x1, x5 = _pair(n, 4 - bits, bits, base, offset, c0, c1, c2, c3)
    x2, x6 = _pair(n, 4 - 2 * bits, bits, base, offset, c0, c1, c2, c3)
    x3, x7 = _pair(n, 4 - 3 * bits, bits, base, offset, c0, c1, c2, c3)
    low = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    high = tl.join(tl.join(x4, x6), tl.join(x5, x7))
    return tl.reshape(tl.join(low, high), (word.shape[0], 16))


@triton.jit
def _many(word, rest, bits, c0, c1, c2, c3):
    """Of 5 to 8 bits."""
    base = ((word & 1) << 1) + 1 - (2 << bits)
    n = (word & -2) ^ ((word & _CHAINED_4) >> 4)
    high, mask = bits - 4, (1 << (bits - 4)) - 1
    unit = tl.exp2(-(bits + 1).to(tl.float32))
    i = coordinate(tl.arange(0, 8))[None, None, :]
    low = (n[:, :, None] >> (4 * i)) & 15
    field = low | (((rest[:, :, None] >> (high * i)) & mask) << 4)
    t = ((field << 2) + base[:, :, None]).to(tl.float32) * unit
    return tl.reshape(_level(t.to(c0.dtype), 0, c0, c1, c2, c3), (word.shape[0], 16))
