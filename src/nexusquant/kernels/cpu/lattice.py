"""The storage codec's lattice, 16 groups of eight coordinates at a time (`entropy.lattice`).

Operations are in the order of the definition, so that all of its points but ties come out.
"""

from __future__ import annotations

import numpy as np
from numba import types

from nexusquant.kernels.cpu.compiled import Kernel, inner
from nexusquant.kernels.cpu.memory import (
    get_float,
    keep,
    load,
    lookup,
    scatter,
    scatter_bytes,
    store,
)
from nexusquant.kernels.cpu.simd import (
    LANES,
    absolute,
    choose,
    lane_numbers,
    nearest,
    splat,
    to_float,
    to_int,
)

f32, i32 = np.float32, np.int32
_GROUP = 8
_FAR = f32(1 << 23)
_SCALE, _DECAY, _PAST, _UNIT = (_GROUP * LANES * k for k in range(4))
"""Where a block's scratch has what; floats."""


@inner
def _of_coset(unit, half):
    """What the nearest points of a coset are: squared distances, whether the sum of the rounded
    coordinates is odd, which of them is moved then, and if it is moved down."""
    far, worst = splat(f32(0)), splat(f32(-1))
    parity = at = down = splat(i32(0))
    for i in range(_GROUP):
        x = load(unit, LANES * i) - splat(half)
        n = nearest(x)
        error = x - n
        size = absolute(error)
        further = size > worst
        worst, at = choose(further, size, worst), choose(further, splat(i32(i)), at)
        below = choose(error < splat(f32(0)), splat(i32(1)), splat(i32(0)))
        down = choose(further, below, down)
        far = far + error * error
        parity = parity ^ to_int(n)
    parity = parity & splat(i32(1))
    odd = parity == splat(i32(1))
    far = far + choose(odd, splat(f32(1)) - splat(f32(2)) * worst, splat(f32(0)))
    return far, parity, at, down


@inner
def _scales(own, variance, size, noise, lanes):
    """The factors of a block, as `entropy.lattice.Steps.scale`."""
    step = splat(size)
    blur = splat(noise) * (step * step)
    for i in range(_GROUP):
        v = lookup(variance, lanes + splat(i32(i)))
        store(own, _SCALE + LANES * i, v / (v + blur) / step)


@inner
def _token(own, y, n, coset, size, lanes, groups):
    """One token of a block: its points, and the prediction of the next token from it."""
    unit = own + 4 * _UNIT
    for i in range(_GROUP):
        guess = load(own, _PAST + LANES * i) * load(own, _DECAY + LANES * i)
        store(own, _PAST + LANES * i, guess)
        x = (lookup(y, lanes + splat(i32(i))) - guess) * load(own, _SCALE + LANES * i)
        x = choose(x < splat(_FAR), x, splat(_FAR))
        store(unit, LANES * i, choose(x > splat(-_FAR), x, splat(-_FAR)))
    even, parity, at, down = _of_coset(unit, f32(0))
    odd, odd_parity, odd_at, odd_down = _of_coset(unit, f32(0.5))
    second = odd < even
    c = choose(second, splat(i32(1)), splat(i32(0)))
    parity, at = choose(second, odd_parity, parity), choose(second, odd_at, at)
    down = choose(second, odd_down, down)
    move = parity - ((parity & down) << splat(i32(1)))
    half = to_float(c) * splat(f32(0.5))
    for i in range(_GROUP):
        point = to_int(nearest(load(unit, LANES * i) - half))
        point = point + choose(at == splat(i32(i)), move, splat(i32(0)))
        scatter(n, lanes + splat(i32(i)), point)
        seen = (to_float(point) + half) * splat(size)
        store(own, _PAST + LANES * i, load(own, _PAST + LANES * i) + seen)
    scatter_bytes(coset, groups, c)


def _quantize(pages, tokens, dim, y, size, variance, decay, noise, n, coset):
    """Addresses of y and n (pages, tokens, dim), size (pages, tokens), variance (2, dim), decay
    (dim,), coset (pages, tokens, dim / 8) bytes; everything else is fp32, n int32."""
    groups = dim // _GROUP
    space = np.zeros(4 * _GROUP * LANES, np.float32)
    own = space.ctypes.data
    for first in range(0, groups, LANES):
        # Lanes behind the last group do it once more: they write what it writes.
        last = splat(i32(groups - 1))
        number = lane_numbers() + splat(i32(first))
        number = choose(number < last, number, last)
        lanes = number << splat(i32(3))
        for i in range(_GROUP):
            store(own, _DECAY + LANES * i, lookup(decay, lanes + splat(i32(i))))
        for page in range(pages):
            for i in range(_GROUP):
                store(own, _PAST + LANES * i, splat(f32(0)))
            before = f32(0)
            for t in range(tokens):
                row = page * tokens + t
                step = get_float(size, row)
                if t <= 1 or step != before:
                    _scales(own, variance + 4 * dim * min(t, 1), step, noise, lanes)
                before = step
                at = 4 * row * dim
                _token(own, y + at, n + at, coset + row * groups, step, lanes, number)
    keep(space)


def _reconstruct(pages, tokens, dim, n, coset, size, decay, y):
    """Inverse, of arrays: n (rows, dim), coset (rows, dim / 8) and so on, page after page."""
    for page in range(pages):
        for t in range(tokens):
            row = page * tokens + t
            step = size[row]
            for g in range(dim // _GROUP):
                half = f32(0.5) if coset[row, g] else f32(0)
                for d in range(_GROUP * g, _GROUP * g + _GROUP):
                    y[row, d] = (f32(n[row, d]) + half) * step
            if t > 0:
                for d in range(dim):
                    y[row, d] += y[row - 1, d] * decay[d]


_long, _float = types.int64, types.float32
quantize = Kernel(_quantize, types.void(*[_long] * 7, _float, _long, _long), "quantize")
reconstruct = Kernel(
    _reconstruct,
    types.void(
        _long, _long, _long, types.int32[:, ::1], types.bool_[:, ::1], _float[::1], _float[::1],
        _float[:, ::1],
    ),
    "reconstruct",
)  # fmt: skip
