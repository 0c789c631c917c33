"""E8C-b: a fixed-rate code of b bits per dimension whose codewords are E8 lattice points in a box.

Eight coordinates share one coset bit c: u_i = 2 n_i + c with n_i in [0, 2^b) and sum(n_i) even.
With equally spaced levels the points are a piece of E8 = D8 u (D8 + 1/2) (Conway & Sloane, SPLAG
ch. 4); with companded levels the same combinatorial code follows a Gaussian. The parity constraint
pays for the coset bit, so a group of 8 takes exactly b bytes:

  bytes 0 to a - 1   a little-endian word of eight fields of a = min(b, 4) bits. Field i has the low
                     bits of n_i, the lowest one chained: s_i = n_i + n_(i+1) + ... + n_7 mod 2.
                     s_0 is always 0, so bit 0 is c instead
  bytes 4 to b - 1   if b > 4, a word of eight fields of b - 4 bits: the rest of every n_i

Unpacking is shifts and masks: the lowest bits are s_i xor s_(i+1), for all i at once.
Nearest-point search is exact: the cost is separable, so per coset take the nearest level of every
coordinate and, if the parity is odd, move the coordinate whose next-best parity costs least
(Conway & Sloane 1982, "Fast quantizing and decoding algorithms", with clamped alternatives).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

GROUP = 8
BITS = (1, 2, 3, 4, 5, 6, 7, 8)
_CHUNK = 1 << 14  # groups encoded at a time: the temporaries stay in cache

# Level u of 2^(b+1), for a unit Gaussian, is t (c0 + c1 t^2 + c2 t^4 + c3 t^6) with
# t = (2 u + 1) / 2^(b+1) - 1 between -1 and 1: decoding is arithmetic, not a table. Companded: by
# Lloyd iteration on the code itself among such polynomials, which are as good as free levels.
# Uniform: the spacing of least error.
_COMPANDED = {
    1: (1.5716, 0.0, 0.0, 0.0),
    2: (1.6256, 1.2172, -2.7889, 2.6867),
    3: (1.7377, 0.8452, -1.2233, 1.5984),
    4: (1.7702, 1.2983, -2.5235, 2.8171),
    5: (2.0446, 1.3704, -2.7705, 3.1739),
    6: (2.0414, 1.8046, -4.1219, 4.4166),
    7: (2.0654, 1.9455, -4.5256, 4.9032),
    8: (2.0752, 1.9949, -4.7299, 5.1350),
}
_UNIFORM_STEP = {
    1: 0.79,
    2: 0.4937,
    3: 0.2917,
    4: 0.1671,
    5: 0.0938,
    6: 0.0519,
    7: 0.0284,
    8: 0.0154,
}
DISTORTION = (1.0, 0.341, 0.0979, 0.0267, 0.00704, 0.0019, 0.000486, 0.0001244, 0.0000314)
"""Mean squared error of the companded code at 0 to 8 bits on a unit Gaussian, per dimension.

With levels as wide as `HEADROOM` makes them it is 1.02 to 1.6 times that; to allocate with those
figures instead changed no KL by more than noise.
"""

HEADROOM = {1: 1.1, 2: 1.3, 3: 1.3, 4: 1.35, 5: 1.4, 6: 1.4, 7: 1.4, 8: 1.4}
"""Factor on the levels per rate that gave the lowest KL on real caches (docs/results). Their
coordinates have heavier tails than a Gaussian, and clipping hurts more than granular noise. (The
quantizer raises the gain of vectors that would be clipped far.)"""


def polynomial(bits: int, kind: str = "companded", widen: float = 1.0) -> tuple[float, ...]:
    """Coefficients c0 to c3 of the levels in t, times `widen`."""
    if kind == "uniform":
        return (_UNIFORM_STEP[bits] * 2**bits * widen, 0.0, 0.0, 0.0)
    return tuple(c * widen for c in _COMPANDED[bits])


@lru_cache(maxsize=64)
def levels(bits: int, kind: str = "companded", widen: float = 1.0) -> Tensor:
    """The 2^(bits+1) sorted reconstruction levels for unit variance, times `widen`. fp32, CPU."""
    count = 2 ** (bits + 1)
    t = (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1
    c = polynomial(bits, kind)
    square = t.square()
    return (t * (c[0] + square * (c[1] + square * (c[2] + square * c[3])))).float() * widen


def nearest_ref(x: Tensor, table: Tensor) -> Tensor:
    """The definition: exact nearest codeword of each group. x (..., 8) -> u (..., 8) int64."""
    cost = (x[..., None] - table) ** 2
    best_u, best_cost = None, None
    for coset in (0, 1):
        by_n = cost[..., coset::2]
        even, odd = by_n[..., 0::2].min(-1), by_n[..., 1::2].min(-1)
        take_odd = odd.values < even.values
        gap = (odd.values - even.values).abs()
        flip = torch.zeros_like(take_odd).scatter(
            -1, gap.argmin(-1, keepdim=True), (take_odd.sum(-1, keepdim=True) % 2).bool()
        )
        take_odd = take_odd ^ flip
        n = torch.where(take_odd, 2 * odd.indices + 1, 2 * even.indices)
        total = torch.where(take_odd, odd.values, even.values).sum(-1, keepdim=True)
        u = 2 * n + coset
        if best_u is None or best_cost is None:
            best_u, best_cost = u, total
        else:
            best_u = torch.where(total < best_cost, u, best_u)
    assert best_u is not None
    return best_u


@dataclass(frozen=True)
class E8Code:
    """One member of the family. `encode` and `decode` map (..., 8) fp32 to (..., bits) bytes.

    Args:
        bits: bits per dimension, 1 to 8.
        kind: "companded" or "uniform" levels.
        widen: factor on the levels; above 1 clips fewer outliers.
    """

    bits: int
    kind: str = "companded"
    widen: float = 1.0

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """Reconstruction levels, (2^(bits+1),) fp32."""
        return levels(self.bits, self.kind, self.widen).to(device)

    def encode(self, x: Tensor) -> Tensor:
        """Nearest codeword of every group. x (..., 8) -> (..., bits) uint8."""
        flat = x.reshape(-1, GROUP).float()
        out = torch.empty(len(flat), self.bits, dtype=torch.uint8, device=x.device)
        for i in range(0, len(flat), _CHUNK):
            out[i : i + _CHUNK] = self._encode_columns(flat[i : i + _CHUNK].T.contiguous()).T
        return out.view(*x.shape[:-1], self.bits)

    def _encode_columns(self, x: Tensor) -> Tensor:
        """x (8, M) -> (bits, M) bytes; one row per coordinate, so every op is a long vector."""
        table = self.levels(x.device)
        even, even_cost = _nearest_even(x, table[0::2].contiguous())
        odd, odd_cost = _nearest_even(x, table[1::2].contiguous())
        coset = odd_cost < even_cost
        n = torch.where(coset, odd, even)
        low, high = split_bits(self.bits)
        chained = n & 1
        for i in range(GROUP - 2, -1, -1):
            chained[i] ^= chained[i + 1]
        chained[0] = coset
        at = torch.arange(GROUP, device=x.device)[:, None]
        words = [((n & ((1 << low) - 2) | chained).long() << (low * at)).sum(0)]
        if high:
            words.append(((n >> low).long() << (high * at)).sum(0))
        sizes = (low, high) if high else (low,)
        return torch.stack(
            [
                (w >> (8 * k)) & 255
                for w, size in zip(words, sizes, strict=True)
                for k in range(size)
            ]
        ).to(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        """Level indices u of codewords. data (..., bits) uint8 -> (..., 8) int64."""
        low, high = split_bits(self.bits)
        at = torch.arange(GROUP, device=data.device)
        word = _word(data[..., :low])[..., None]
        coset = word & 1
        word = word & ~1
        word = word ^ ((word & lowest_bits(low)) >> low)
        n = (word >> (low * at)) & ((1 << low) - 1)
        if high:
            rest = _word(data[..., low:])[..., None]
            n = n | (((rest >> (high * at)) & ((1 << high) - 1)) << low)
        return 2 * n + coset

    def decode_ref(self, data: Tensor) -> Tensor:
        """The definition of decoding: unpack, then look up. (..., bits) uint8 -> (..., 8) fp32."""
        return self.levels(data.device)[self.unpack(data)]

    def decode(self, data: Tensor) -> Tensor:
        """Equal to `decode_ref`; at 1 and 2 bits one table row per group."""
        if self.bits > 2:
            return self.decode_ref(data)
        table = _word_table(self, data.device)
        return torch.nn.functional.embedding(_word(data).int(), table)


@dataclass(frozen=True)
class Book:
    """The codes of all rates: book[bits].

    Args:
        kind: "companded" or "uniform" levels.
        overload: factor on the levels, on top of `HEADROOM`.
    """

    kind: str = "companded"
    overload: float = 1.0

    def __getitem__(self, bits: int) -> E8Code:
        return E8Code(bits, self.kind, self.overload * HEADROOM[bits])


def split_bits(bits: int) -> tuple[int, int]:
    """Bits per field of the two words of a codeword."""
    return min(bits, 4), max(bits - 4, 0)


def lowest_bits(low: int) -> int:
    """Mask of the lowest bit of every field but the first one of a word of `low`-bit fields."""
    return sum(1 << (low * i) for i in range(1, GROUP))


def _word(data: Tensor) -> Tensor:
    """(..., up to 4) bytes, little-endian, to (...) int64."""
    weight = 1 << (8 * torch.arange(data.shape[-1], device=data.device))
    return (data.long() * weight).sum(-1)


@lru_cache(maxsize=16)
def _word_table(code: E8Code, device: torch.device) -> Tensor:
    """All codewords of a code of 1 or 2 bits, (256 or 65536, 8) fp32."""
    words = torch.arange(1 << (8 * code.bits))
    planes = [(words >> (8 * plane)) & 255 for plane in range(code.bits)]
    return code.decode_ref(torch.stack(planes, -1).to(torch.uint8)).to(device)


def _nearest_even(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest n with even sum within one coset. x (8, M) -> n (8, M) int32, squared error (M,)."""
    n = torch.bucketize(x, (table[1:] + table[:-1]) / 2, out_int32=True)
    far = table.new_tensor([1e18])
    padded = torch.cat([-far, table, far])
    error = (x - table[n]) ** 2
    down, up = (x - padded[n]) ** 2, (x - padded[n + 2]) ** 2
    extra, where = (torch.minimum(down, up) - error).min(0)
    odd = (n.sum(0, dtype=torch.int32) & 1).bool()
    cost = error.sum(0) + torch.where(odd, extra, 0.0)
    pick = where[None]
    step = torch.where(down.gather(0, pick) < up.gather(0, pick), -1, 1).to(torch.int32)
    return n.scatter_add(0, pick, step * odd[None].int()), cost
