"""Vectors of one layer (keys or values) to codes and back: centre, transform, gain, E8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nexusquant.errors import NonFiniteError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import DISTORTION, GROUP, HEADROOM, E8Code
from nexusquant.math.gains import GAINS, LIMIT, decode_gain, encode_gain
from nexusquant.math.transform import orthonormal
from nexusquant.profile import Profile

_STEPS = 6  # gains tried above a vector's size: two octaves


class Basis(Protocol):
    """The coordinates that a layer's keys or values are coded in."""

    def forward(self, device: torch.device) -> Tensor:
        """(heads or 1, dim, dim) fp32: code space from centred, scaled vectors."""

    def inverse(self, device: torch.device) -> Tensor:
        """Its inverse."""

    def mean(self, device: torch.device) -> Tensor:
        """(1, heads or 1, 1, dim or 1) fp32, for sequences too short to have their own."""


@dataclass(frozen=True)
class Orthonormal:
    """A fixed orthonormal transform (`nexusquant.math.transform`)."""

    name: str
    dim: int

    def forward(self, device: torch.device) -> Tensor:
        """(1, dim, dim)."""
        return orthonormal(self.name, self.dim, device)[None]

    def inverse(self, device: torch.device) -> Tensor:
        """(1, dim, dim)."""
        return orthonormal(self.name, self.dim, device).mT[None]

    def mean(self, device: torch.device) -> Tensor:
        """Zero."""
        return torch.zeros(1, 1, 1, 1, device=device)


class Profiled:
    """The transform of one layer and side of a profile, which stays the owner of the tensors."""

    def __init__(self, profile: Profile, layer: int, side: str) -> None:
        self.profile, self.layer, self.side = profile, layer, side

    def forward(self, device: torch.device) -> Tensor:
        """(heads, dim, dim)."""
        return self.profile.side(self.layer, self.side, device).forward

    def inverse(self, device: torch.device) -> Tensor:
        """(heads, dim, dim)."""
        return self.profile.side(self.layer, self.side, device).inverse

    def mean(self, device: torch.device) -> Tensor:
        """(1, heads, 1, dim)."""
        return self.profile.side(self.layer, self.side, device).mean[None, :, None]


@dataclass(frozen=True)
class Centre:
    """What a sequence's vectors are relative to: x = mean + scale * vector.

    Attributes:
        mean: (batch, heads, 1, dim), None for the basis's own.
        scale: (batch, heads, 1, dim or 1), None for 1.
    """

    mean: Tensor | None = None
    scale: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Centre:
        """Apply a batch operation."""
        return Centre(*(None if x is None else fn(x) for x in (self.mean, self.scale)))


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one layer's keys or of its values. Holds settings only, no tensors.

    With T the basis, m and s the sequence's centre and g the token gain, a vector x becomes the
    codeword nearest to T((x - m) / s) / g.

    Attributes:
        heads: which KV heads of the layer it codes, None for all. The layout and all vectors have
            these only; the basis and the centres are the layer's.
    """

    layout: RowLayout
    basis: Basis
    levels: str = "companded"
    overload: float = 1.0
    heads: tuple[int, ...] | None = None

    def of_heads(self, heads: tuple[int, ...] | None) -> Quantizer:
        """This quantizer of all heads for some of them, None for all."""
        if heads is None:
            return self
        return replace(self, layout=self.layout.of_heads(heads), heads=heads)

    @property
    def codes(self) -> dict[int, E8Code]:
        """The code of every rate in use."""
        used = {bits for head in self.layout.rates for bits in head if bits}
        return {b: E8Code(b, self.levels, self.overload * HEADROOM[b]) for b in used}

    def encode(
        self, x: Tensor, centre: Centre, empty: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (batch, heads, tokens, dim) -> rows (batch, tokens, row_bytes), gains (b, h, t) 0-15.

        Args:
            empty: (batch or 1, heads or 1, tokens, 1) bool, entries whose vectors mean nothing.

        Raises:
            NonFiniteError: NaN, infinity, or vectors far beyond the others of the sequence.
        """
        y = x.float() - self._mean(centre, x.device)
        if empty is not None:  # zeros would be far off where the mean is large
            y = y.masked_fill(empty, 0)
        if centre.scale is not None:
            y = y / self._own(centre.scale).float()
        y = y @ self._own(self.basis.forward(x.device)).mT
        gains = self._gains(y)
        return self.layout.encode(y / decode_gain(gains)[..., None], self.codes), gains

    def _gains(self, y: Tensor) -> Tensor:
        """Gain codes (b, h, t) of vectors in code space: their RMS, unless that clips too much."""
        stored = self.layout.stored(y.device).repeat_interleave(GROUP, -1).float()
        count = stored.sum(-1, keepdim=True).clamp(min=1)
        rms = ((y.square() * stored[:, None]).sum(-1) / count).sqrt()
        if not bool((rms <= LIMIT).all()):
            bad = int((~(rms <= LIMIT)).sum())
            raise NonFiniteError(
                f"{bad} of {rms.numel()} vectors are NaN, infinite or over {LIMIT:.0f} times as"
                " large as is usual there; they cannot be coded. Check the model's dtype and"
                " inputs, or use codec='exact'."
            )
        gains = encode_gain(rms)
        reach, price = self._clipping(y.device)
        clipped = _clipped(y, decode_gain(gains), reach[:, None], price[:, None])
        batch, head, token = (clipped > count * decode_gain(gains).square()).nonzero(as_tuple=True)
        if len(head):
            few = y[batch, head, token]
            gains[batch, head, token] = _best_gain(
                few, gains[batch, head, token], reach[head], price[head], count[head, 0]
            )
        return gains

    def _clipping(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(heads, dim) largest level of every coordinate, and what squared error beyond it costs.

        The allocation gives bits where distortion costs most, so that it costs the same everywhere:
        the unit is the granular noise of a coordinate.
        """
        rates = torch.tensor(self.layout.rates)
        reach, price = torch.zeros(2, len(DISTORTION))
        for bits, code in self.codes.items():
            reach[bits], price[bits] = code.levels()[-1], 1 / DISTORTION[bits]
        return tuple(x[rates].repeat_interleave(GROUP, -1).to(device) for x in (reach, price))

    def coordinates(self, rows: Tensor, gains: Tensor) -> Tensor:
        """Decoded but still in code space, (batch, heads, tokens, dim) fp32."""
        return self.layout.decode(rows, self.codes) * decode_gain(gains)[..., None]

    def leave(self, y: Tensor, centre: Centre) -> Tensor:
        """Code space to vectors: of decoded tokens, or of sums of them with weights adding to 1."""
        x = y @ self._own(self.basis.inverse(y.device)).mT
        if centre.scale is not None:
            x = x * self._own(centre.scale).float()
        return x + self._mean(centre, y.device)

    def _mean(self, centre: Centre, device: torch.device) -> Tensor:
        return self._own(self.basis.mean(device) if centre.mean is None else centre.mean).float()

    def _own(self, x: Tensor) -> Tensor:
        """x (..., heads or 1, n, m) of the layer, at the heads coded here."""
        if self.heads is None or x.shape[-3] == 1:
            return x
        return x[..., list(self.heads), :, :]

    def decode(self, rows: Tensor, gains: Tensor, centre: Centre) -> Tensor:
        """Inverse of `encode` up to the code's distortion. (batch, heads, tokens, dim) fp32."""
        return self.leave(self.coordinates(rows, gains), centre)


def _clipped(y: Tensor, gain: Tensor, reach: Tensor, price: Tensor) -> Tensor:
    """What clipping costs vectors y (..., dim) coded with `gain` (...)."""
    beyond = (y.abs() - reach * gain[..., None]).clamp(min=0)
    return (beyond.square() * price).sum(-1)


def _best_gain(y: Tensor, codes: Tensor, reach: Tensor, price: Tensor, count: Tensor) -> Tensor:
    """The code, from `codes` (n,) up, with which clipping and granular noise of y (n, dim) cost
    least; reach and price (n, dim), count (n,) coded coordinates."""
    best, least = codes, torch.full_like(count, torch.inf)
    for step in range(_STEPS + 1):
        tried = (codes + step).clamp(max=GAINS - 1)
        gain = decode_gain(tried)
        cost = _clipped(y, gain, reach, price) + count * gain.square()
        best, least = torch.where(cost < least, tried, best), torch.minimum(cost, least)
    return best
