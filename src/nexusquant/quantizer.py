"""Vectors of one layer (keys or values) to codes and back: centre, transform, gain, E8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.errors import NonFiniteError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import E8Code
from nexusquant.math.gains import LIMIT, decode_gain, encode_gain
from nexusquant.math.transform import orthonormal


@dataclass(frozen=True)
class Codes:
    """Coded vectors, uint8: `rows` (batch, heads, tokens, row_bytes), `gains` without the last."""

    rows: Tensor
    gains: Tensor

    def append(self, other: Codes) -> Codes:
        """The vectors of both, along the tokens."""
        return Codes(torch.cat([self.rows, other.rows], 2), torch.cat([self.gains, other.gains], 2))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Codes:
        """Apply a batch operation."""
        return Codes(fn(self.rows), fn(self.gains))

    def part(self, tokens: slice) -> Codes:
        """Views of some tokens."""
        return Codes(self.rows[:, :, tokens], self.gains[:, :, tokens])


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one layer's keys or of its values. Holds settings only, no tensors.

    With T the orthonormal transform, m the mean and g the token gain, a vector x becomes
    the codeword nearest to T(x - m) / g.
    """

    layout: RowLayout
    transform: str = "hadamard"
    levels: str = "companded"
    overload: float = 1.0

    @property
    def dim(self) -> int:
        """Elements per vector."""
        return len(self.layout.rates[0]) * 8

    @property
    def codes(self) -> dict[int, E8Code]:
        """The code of every rate in use."""
        used = {bits for head in self.layout.rates for bits in head if bits}
        return {bits: E8Code(bits, self.levels, self.overload) for bits in used}

    def matrix(self, device: torch.device) -> Tensor:
        """T, (dim, dim) fp32."""
        return orthonormal(self.transform, self.dim, device)

    def encode(self, x: Tensor, mean: Tensor) -> Codes:
        """x (batch, heads, tokens, dim), mean (batch, heads, 1, dim) -> codes.

        Raises:
            NonFiniteError: NaN, infinity, or magnitudes beyond the range of a gain.
        """
        y = (x.float() - mean.float()) @ self.matrix(x.device).mT
        rms = y.square().mean(-1).sqrt()
        if not bool((rms <= LIMIT).all()):
            bad = int((~(rms <= LIMIT)).sum())
            raise NonFiniteError(
                f"{bad} of {rms.numel()} vectors are NaN, infinite or have an RMS above"
                f" {LIMIT:.0f}; they cannot be coded. Check the model's dtype and inputs, or use"
                " codec='exact'."
            )
        gains = encode_gain(rms)
        scale = decode_gain(gains)[..., None]
        unit = torch.where(scale > 0, y / scale, 0.0)
        return Codes(self.layout.encode(unit, self.codes), gains)

    def decode(self, codes: Codes, mean: Tensor) -> Tensor:
        """Inverse of `encode` up to the code's distortion. (batch, heads, tokens, dim) fp32."""
        y = self.coordinates(codes)
        return y @ self.matrix(y.device) + mean.float()

    def coordinates(self, codes: Codes) -> Tensor:
        """Decoded but still in transform space and centred, (batch, heads, tokens, dim) fp32."""
        return self.layout.decode(codes.rows, self.codes) * decode_gain(codes.gains)[..., None]
