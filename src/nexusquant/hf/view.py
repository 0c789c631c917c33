"""Shapes that models give keys and values on their way to a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """How a handle's tensor follows from K or V (batch, kv_heads, tokens, dim).

    Args:
        repeat: copies of the only KV head.
        flat: batch and heads are one dimension.
        transposed: the last two dimensions are swapped.
        dtype: cast to; None as K and V are.
    """

    repeat: int = 1
    flat: bool = False
    transposed: bool = False
    dtype: torch.dtype | None = None

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """Of the handle, from that of K or V."""
        batch, heads, tokens, dim = base
        lead = (batch * heads * self.repeat,) if self.flat else (batch, heads * self.repeat)
        return (*lead, dim, tokens) if self.transposed else (*lead, tokens, dim)

    def strides(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor that is contiguous but for the transposition."""
        tokens, dim = base[2:]
        whole = tokens * dim
        lead = (whole,) if self.flat else (base[1] * self.repeat * whole, whole)
        return (*lead, 1, dim) if self.transposed else (*lead, dim, 1)

    def of(self, x: Tensor) -> Tensor:
        """The tensor, from K or V or what has their first three dimensions."""
        if self.repeat > 1:
            x = x.expand(-1, self.repeat, *x.shape[2:])
        if self.flat:
            x = x.flatten(0, 1)
        if self.transposed:
            x = x.mT
        return x if self.dtype is None else x.to(self.dtype)
