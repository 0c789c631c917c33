"""Vectors of one layer (keys or values) to codes and back: centre, transform, gain, E8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nexusquant.kernels import operator_for
from nexusquant.kernels.base import Entry, Space, of_heads
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import Book
from nexusquant.math.transform import orthonormal
from nexusquant.profile import Profile


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
    def book(self) -> Book:
        """The codes of all rates."""
        return Book(self.levels, self.overload)

    def space(self, centre: Centre, device: torch.device) -> Space:
        """Code space of a sequence."""
        mean = self.basis.mean(device) if centre.mean is None else centre.mean
        return Space(self.basis.inverse(device), mean, centre.scale)

    def encode(
        self, x: Tensor, centre: Centre, empty: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (batch, heads, tokens, dim) -> rows (batch, row_bytes, tokens), gains (b, h, t) 0-15.

        Args:
            empty: (batch or 1, heads or 1, tokens, 1) bool, entries whose vectors mean nothing.

        Raises:
            NonFiniteError: NaN, infinity, or vectors far beyond the others of the sequence.
        """
        mean = self.basis.mean(x.device) if centre.mean is None else centre.mean
        scale = None if centre.scale is None else self._own(centre.scale)
        entry = Entry(self._own(self.basis.forward(x.device)), self._own(mean), scale, empty)
        return operator_for(x.device).encode(x, self.layout, self.book, entry)

    def coordinates(self, rows: Tensor, gains: Tensor) -> Tensor:
        """Decoded but still in code space, (batch, heads, tokens, dim) fp32."""
        return operator_for(rows.device).decode(rows, gains, self.layout, self.book)

    def leave(self, y: Tensor, centre: Centre) -> Tensor:
        """Code space to vectors: of decoded tokens, or of sums of them with weights adding to 1."""
        return self.space(centre, y.device).leave(y, self.heads)

    def _own(self, x: Tensor) -> Tensor:
        """x (..., heads or 1, n, m) of the layer, at the heads coded here."""
        return of_heads(x, self.heads)

    def decode(self, rows: Tensor, gains: Tensor, centre: Centre) -> Tensor:
        """Inverse of `encode` up to the code's distortion. (batch, heads, tokens, dim) fp32."""
        return self.leave(self.coordinates(rows, gains), centre)
