"""Splits of coded and of uncoded tokens together, out of code space."""

from __future__ import annotations

import triton
import triton.language as tl

from nexusquant.kernels.gpu.attend import FIELDS, HEAD_MAP, HIDDEN, LOG2E, STORED


@triton.jit
def _joined(top, other):
    """The larger logit, and the factors on what was relative to either."""
    new = tl.maximum(top, other)
    safe = tl.where(new == HIDDEN, 0.0, new)
    return new, tl.exp2(top - safe), tl.exp2(other - safe)


@triton.jit
def merge(
    PARTS, SPLIT_PART, CODED, CODED_TOP, CODED_MASS, splits,
    EXACT, EXACT_TOP, EXACT_MASS, exact_splits,
    INVERSE, inverse_head, SCALE, scale_batch, scale_head, scale_dim,
    MEAN, mean_batch, mean_head, SINKS, OUT, LSE, kv_heads, dim,
    ROWS: tl.constexpr, Q_LEN: tl.constexpr, RP: tl.constexpr, RM: tl.constexpr,
    DP: tl.constexpr, CB: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """CB coordinates of the output of one KV head's queries.

    Args:
        SPLIT_PART: (splits,) int32, the part that a split of coded tokens is of.
        CODED, CODED_TOP, CODED_MASS: from `attend.values`; EXACT and so on from `attend.exact`.
        INVERSE: (heads or 1, dim, dim) fp32; SCALE, MEAN: of the values' code space.
        SINKS: (query heads,) fp32.
        OUT: (batch kv_heads, ROWS, dim); LSE: (batch kv_heads, ROWS), natural.
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * CB
    b, h = row // kv_heads, row % kv_heads
    r, d, c = tl.arange(0, RM), tl.arange(0, DP), first + tl.arange(0, CB)
    real, inside = r < ROWS, (c < dim)[None, :]
    top, mass = tl.full((RM,), HIDDEN, tl.float32), tl.zeros((RM,), tl.float32)
    if HAS_SINKS:
        sink = tl.load(SINKS + h * (ROWS // Q_LEN) + r // Q_LEN, mask=real, other=0.0)
        top, mass = sink.to(tl.float32) * LOG2E, tl.full((RM,), 1.0, tl.float32)
    own = tl.zeros((RM, CB), tl.float32)
    for i in range(exact_splits):
        at = (row * exact_splits + i) * RP + r
        other = tl.load(EXACT_TOP + at, mask=real, other=HIDDEN)
        top, decay, grow = _joined(top, other)
        mass = mass * decay + tl.load(EXACT_MASS + at, mask=real, other=0.0) * grow
        x = tl.load(EXACT + at[:, None] * dim + c[None, :], mask=real[:, None] & inside, other=0.0)
        own = own * decay[:, None] + x * grow[:, None]
    code, coded = tl.zeros((RM, DP), tl.float32), tl.zeros((RM,), tl.float32)
    for i in range(splits):
        part = PARTS + tl.load(SPLIT_PART + i) * FIELDS
        hp = tl.load(tl.load(part + HEAD_MAP).to(tl.pointer_type(tl.int32)) + h)
        if hp >= 0:
            groups = tl.load(tl.load(part + STORED).to(tl.pointer_type(tl.int64)) + hp)
            stored = ((groups >> (d // 8)) & 1) > 0
            at = (row * splits + i) * RP + r
            other = tl.load(CODED_TOP + at, mask=real, other=HIDDEN)
            top, decay, grow = _joined(top, other)
            coded = coded * decay + tl.load(CODED_MASS + at, mask=real, other=0.0) * grow
            mass, own = mass * decay, own * decay[:, None]
            x = tl.load(
                CODED + at[:, None] * dim + d[None, :],
                mask=real[:, None] & (stored & (d < dim))[None, :], other=0.0,
            )  # fmt: skip
            code = code * decay[:, None] + x * grow[:, None]
    if splits > 0:
        inverse = tl.load(
            INVERSE + h * inverse_head + c[None, :] * dim + d[:, None],
            mask=inside & (d < dim)[:, None], other=0.0,
        )  # fmt: skip
        x = tl.dot(code, inverse, input_precision="ieee")
        if HAS_SCALE:
            at = SCALE + b * scale_batch + h * scale_head + c * scale_dim
            x *= tl.load(at, mask=c < dim, other=0.0).to(tl.float32)[None, :]
        if HAS_MEAN:
            at = MEAN + b * mean_batch + h * mean_head + c
            x += coded[:, None] * tl.load(at, mask=c < dim, other=0.0).to(tl.float32)[None, :]
        own += x
    mass += coded
    empty = mass == 0.0
    own = tl.where(empty[:, None], 0.0, own / tl.where(empty, 1.0, mass)[:, None])
    at = (row * ROWS + r)[:, None] * dim + c[None, :]
    tl.store(OUT + at, own, mask=real[:, None] & inside)
    lse = tl.where(empty, HIDDEN, (top + tl.log2(tl.where(empty, 1.0, mass))) / LOG2E)
    tl.store(LSE + row * ROWS + r, lse, mask=real)
