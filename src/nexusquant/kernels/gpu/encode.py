"""Vectors to codes in one launch: centre, transform, gain, nearest codeword, bytes; and back."""

from __future__ import annotations

import triton
import triton.language as tl

from nexusquant.kernels.gpu.attend import BITS, CHUNK, GROUP_0, GROUP_1, ROW_0, ROW_1
from nexusquant.kernels.gpu.code import codewords, coordinate

# Columns of a line of the level table: what clipping costs, then all levels in order, and the
# thresholds of either coset.
REACH, PRICE, LOWEST, LEVELS, EDGES, COSET, LINE = (
    tl.constexpr(i) for i in (0, 1, 2, 16, 528, 256, 1040)
)
_STEPS = tl.constexpr(7)  # gains tried from a vector's size up: two octaves
_FAR = tl.constexpr(1e18)


@triton.jit
def _entered(
    X, x_batch, x_head, x_token, x_dim, FORWARD, forward_head, MEAN, mean_batch, mean_head,
    mean_dim, SCALE, scale_batch, scale_head, scale_dim, EMPTY, empty_batch, empty_head,
    b, h, t, seen, dim, DP: tl.constexpr, ENTER: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_EMPTY: tl.constexpr,
):  # fmt: skip
    """Vectors in code space, (tokens, DP) fp32."""
    d = tl.arange(0, DP)
    x = X + b * x_batch + h * x_head + t[:, None].to(tl.int64) * x_token
    if ENTER:
        y = tl.zeros((t.shape[0], DP), tl.float32)
        for begin in range(0, dim, 16):
            i = begin + tl.arange(0, 16)
            inside = i < dim
            v = tl.load(x + i[None, :] * x_dim, mask=seen[:, None] & inside[None, :], other=0.0).to(
                tl.float32
            )
            mean = MEAN + b * mean_batch + h * mean_head + i * mean_dim
            v -= tl.load(mean, mask=inside, other=0.0).to(tl.float32)[None, :]
            if HAS_EMPTY:
                at = EMPTY + b * empty_batch + h * empty_head + t
                v = tl.where(tl.load(at, mask=seen, other=0).to(tl.int1)[:, None], 0.0, v)
            if HAS_SCALE:
                at = SCALE + b * scale_batch + h * scale_head + i * scale_dim
                v /= tl.load(at, mask=inside, other=1.0).to(tl.float32)[None, :]
            forward = tl.load(
                FORWARD + h * forward_head + d[None, :] * dim + i[:, None],
                mask=inside[:, None] & (d < dim)[None, :], other=0.0,
            )  # fmt: skip
            y = tl.dot(v, forward, y, input_precision="tf32x3")
    else:
        known = seen[:, None] & (d < dim)[None, :]
        y = tl.load(x + d[None, :] * x_dim, mask=known, other=0.0).to(tl.float32)
    return tl.where(seen[:, None], y, 0.0)


@triton.jit
def _gain(y, seen, stored, reach, price, BOUNDARIES, GAINS, BAD, limit):
    """Gain codes of y (tokens, DP); see `kernels.reference`."""
    count = tl.maximum(tl.sum(stored.to(tl.float32), 0), 1.0)
    own = y * stored.to(tl.float32)[None, :]  # NaN if y is, or infinite
    rms = tl.sqrt(tl.sum(own * own, 1) / count)
    bad = tl.sum((seen & ~(rms <= limit)).to(tl.int32), 0)
    if bad > 0:
        tl.atomic_add(BAD, bad)
    k = tl.arange(0, 16)
    edges = tl.load(BOUNDARIES + k, mask=k < 15, other=float("inf"))
    code = tl.sum((rms[:, None] > edges[None, :]).to(tl.int32), 1)
    gain = tl.load(GAINS + code)
    clipped = _clipped(y, gain, reach, price)
    retry = clipped > count * gain * gain
    if tl.max(retry.to(tl.int32), 0) > 0:
        best, least = code, tl.full(code.shape, float("inf"), tl.float32)
        for step in tl.static_range(_STEPS):
            tried = tl.minimum(code + step, 15)
            gain = tl.load(GAINS + tried)
            cost = _clipped(y, gain, reach, price) + count * gain * gain
            best = tl.where(cost < least, tried, best)
            least = tl.minimum(cost, least)
        code = tl.where(retry, best, code)
    return code


@triton.jit
def _clipped(y, gain, reach, price):
    """What clipping costs."""
    beyond = tl.maximum(tl.abs(y) - reach[None, :] * gain[:, None], 0.0)
    return tl.sum(beyond * beyond * price[None, :], 1)


@triton.jit
def _nearest(x, bits, most, line, coset: tl.constexpr):
    """Of x (tokens, groups, 8): fields of the nearest even-sum word of a coset, squared error.

    `most`: the largest of the rates `bits`.
    """
    edges, levels = line + EDGES + COSET * coset, line + LEVELS + coset
    n = tl.zeros(x.shape, tl.int32)
    for k in range(1, most + 1):
        step = 1 << (most - k)
        use = (most - k < bits) & (n >= 0)
        edge = tl.load(edges + n + (step - 1), mask=use, other=float("inf"))
        n += tl.where(x > edge, step, 0)
    some, last = (bits > 0) & (n >= 0), (1 << bits) - 1
    error = x - tl.load(levels + 2 * n, mask=some, other=0.0)
    down = x - tl.load(levels + 2 * n - 2, mask=some & (n > 0), other=-_FAR)
    up = x - tl.load(levels + 2 * n + 2, mask=some & (n < last), other=_FAR)
    error, down, up = error * error, down * down, up * up
    extra = tl.minimum(down, up) - error
    odd = (tl.sum(n, 2) & 1) > 0
    where = tl.argmin(extra, 2)
    cost = tl.sum(error, 2) + tl.where(odd, tl.min(extra, 2), 0.0)
    here = (tl.arange(0, 8)[None, None, :] == where[:, :, None]) & odd[:, :, None]
    return n + tl.where(here, tl.where(down < up, -1, 1), 0), cost


@triton.jit
def encode(
    X, x_batch, x_head, x_token, x_dim, FORWARD, forward_head, MEAN, mean_batch, mean_head,
    mean_dim, SCALE, scale_batch, scale_head, scale_dim, EMPTY, empty_batch, empty_head,
    RATES, FIRST, TABLE, BOUNDARIES, GAINS, limit, OUT, CODES, BAD, heads, tokens, dim, row_bytes,
    BT: tl.constexpr, DP: tl.constexpr, ENTER: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_EMPTY: tl.constexpr,
):  # fmt: skip
    """Codes of BT tokens of one head.

    Args:
        X: (batch, heads, tokens, dim), and its strides in elements.
        FORWARD, MEAN, SCALE, EMPTY: see `nexusquant.kernels.base.Entry`.
        RATES, FIRST: (heads, dim / 8) int32, rates and first rows of groups.
        TABLE: fp32, a line per rate, see above.
        OUT: (batch, row_bytes, tokens) uint8; CODES: (batch, heads, tokens) uint8, gains.
        BAD: int32, to which the number of vectors that no gain fits is added.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    seen = t < tokens
    y = _entered(
        X, x_batch, x_head, x_token, x_dim, FORWARD, forward_head, MEAN, mean_batch, mean_head,
        mean_dim, SCALE, scale_batch, scale_head, scale_dim, EMPTY, empty_batch, empty_head,
        b, h, t, seen, dim, DP, ENTER, HAS_SCALE, HAS_EMPTY,
    )  # fmt: skip
    d, g = tl.arange(0, DP), tl.arange(0, DP // 8)
    rate = tl.load(RATES + h * (dim // 8) + d // 8, mask=d < dim, other=0)
    reach, price = tl.load(TABLE + rate * LINE + REACH), tl.load(TABLE + rate * LINE + PRICE)
    code = _gain(y, seen, rate > 0, reach, price, BOUNDARIES, GAINS, BAD, limit)
    tl.store(CODES + row * tokens + t, code.to(tl.uint8), mask=seen)
    x = tl.reshape(y / tl.load(GAINS + code)[:, None], (BT, DP // 8, 8))
    bits = tl.load(RATES + h * (dim // 8) + g, mask=g < dim // 8, other=0)
    wide = bits[None, :, None]
    line = TABLE + wide * LINE
    most = tl.max(bits)
    even, even_cost = _nearest(x, wide, most, line, 0)
    odd, odd_cost = _nearest(x, wide, most, line, 1)
    coset = odd_cost < even_cost
    n = tl.where(coset[:, :, None], odd, even)
    low, i = tl.minimum(bits, 4)[None, :], tl.arange(0, 8)[None, None, :]
    size = low[:, :, None]
    word = tl.sum((n & ((1 << size) - 1)) << (size * i), 2)
    lowest = tl.load(TABLE + bits * LINE + LOWEST).to(tl.int32, bitcast=True)[None, :]
    chain = word & lowest
    chain ^= chain >> low
    chain ^= chain >> (2 * low)
    chain ^= chain >> (4 * low)
    word = (word & ~lowest) | chain | coset.to(tl.int32)
    high = tl.maximum(wide - 4, 0)
    rest = tl.sum(tl.where(wide > 4, (n >> 4) << (high * i), 0), 2)
    first = tl.load(FIRST + h * (dim // 8) + g, mask=g < dim // 8, other=0).to(tl.int64)
    at = OUT + (b * row_bytes + first)[None, :] * tokens + t[:, None]
    for k in tl.static_range(8):
        byte = (word >> (8 * k)) if k < 4 else (rest >> (8 * (k - 4)))
        tl.store(at + k * tokens, byte.to(tl.uint8), mask=seen[:, None] & (k < bits)[None, :])


@triton.jit
def decode(
    ROWS, row_batch, row_stride, CODES, code_batch, code_head, CHUNKS, chunks, TABLE, GAINS, OUT,
    heads, tokens, dim, BT: tl.constexpr,
):  # fmt: skip
    """Two groups of BT tokens' vectors in code space, (batch heads, tokens, dim) fp32."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    t, lane = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, 16)
    seen, chunk = t < tokens, CHUNKS + (h * chunks + tl.program_id(2)) * CHUNK
    bits = tl.load(chunk + BITS)
    if bits > 0:
        second = tl.arange(0, 2) == 1
        rows = tl.where(second, tl.load(chunk + ROW_1), tl.load(chunk + ROW_0))
        x = codewords(
            ROWS + b * row_batch, rows, row_stride, t, seen, bits, TABLE, dtype=tl.float32
        )
        code = tl.load(CODES + b * code_batch + h * code_head + t, mask=seen, other=0)
        x *= tl.load(GAINS + code.to(tl.int32))[:, None]
        group = tl.where(lane < 8, tl.load(chunk + GROUP_0), tl.load(chunk + GROUP_1))
        at = OUT + (row * tokens + t)[:, None] * dim + (group * 8 + coordinate(lane))[None, :]
        tl.store(at, x, mask=seen[:, None] & (group >= 0)[None, :])
