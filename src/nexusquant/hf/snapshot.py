"""One layer's keys and values at one `update`, for whoever computes attention over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.hf.precision import own_arithmetic
from nexusquant.kernels.base import spread
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer


@dataclass(frozen=True)
class Snapshot:
    """One layer at one `update`: the stored past, the uncoded tail including the new tokens.

    Args:
        tail_keys, tail_values: (batch, kv_heads, tail, dim) at slots tail_start, tail_start + 1...
        new: how many of them came with this call.
        first_column: slot that column 0 of the attention mask stands for.
        queries: those of this call, once a model that computes attention itself has shown them.
    """

    layer: CompactLayer
    stored: Stored
    tail_keys: Tensor
    tail_values: Tensor
    tail_start: int
    new: int
    first_column: int
    queries: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Logical length, the new tokens included."""
        return self.tail_start + self.tail_keys.shape[2]

    @property
    def visible(self) -> int:
        """Length of the K and V that an uncompressed layer would return."""
        return self.length - self.first_column

    @property
    def compressed(self) -> bool:
        """Whether visible slots left the tail (possibly as padding, of which nothing is stored)."""
        return self.tail_start > self.first_column

    def parts(self) -> list[CodedTokens | ExactTokens]:
        """Everything to attend to."""
        tail = ExactTokens(
            self.tail_keys, self.tail_values, Slots(self.tail_start, self.tail_keys.shape[2])
        )
        return [*self.stored.parts(), tail]

    def shape(self, which: int) -> tuple[int, int, int, int]:
        """(batch, kv_heads, visible, dim) of K (0) or V (1)."""
        batch, heads, _, dim = (self.tail_keys, self.tail_values)[which].shape
        return batch, heads, self.visible, dim

    def dense(self, which: int) -> Tensor:
        """K (0) or V (1) as the uncompressed layer would return it (decoded where coded).

        Raises:
            UnsupportedError: tokens were evicted, so there is no such tensor.
        """
        whole, missing = self.filled(which)
        if missing is not None:
            raise UnsupportedError(
                f"layer {self.layer.layer_idx} has evicted or padded tokens, so its keys and"
                " values do not exist as one tensor. Something reads them outside of attention;"
                " use evict_ratio=0 without padding, or an uncompressed cache."
            )
        return whole

    def filled(self, which: int) -> tuple[Tensor, Tensor | None]:
        """K (0) or V (1) with zeros for tokens that are not there, and which those are.

        The latter is (batch, kv_heads, visible) bool, or None if none is missing.
        """
        if not self.compressed:
            surplus = self.first_column - self.tail_start
            return (self.tail_keys, self.tail_values)[which][:, :, surplus:], None
        with own_arithmetic(self.tail_keys.device):
            missing = ~self._seen()[:, :, self.first_column :]
            whole = self._scattered(which)[:, :, self.first_column :]
        return whole, missing if bool(missing.any()) else None

    def _scattered(self, which: int) -> Tensor:
        """(batch, kv_heads, length, dim) keys or values at their slots."""
        like = (self.tail_keys, self.tail_values)[which]
        whole = like.new_zeros(*like.shape[:2], self.length, like.shape[-1])
        frame = self.layer.frame()
        for part in self.parts():
            at = part.slots.positions(part.device).expand(len(like), part.kv_heads, -1)
            if isinstance(part, ExactTokens):
                x = (part.keys, part.values)[which]
            elif which == 0:
                x = frame.leave(part.keys(), at)
            else:
                x = part.values()
            x, at = (spread(y, part.heads, like.shape[1], fill) for y, fill in ((x, 0), (at, -1)))
            filled = (at >= 0)[..., None]
            index = at.clamp(min=0)[..., None].expand_as(x)
            whole.scatter_add_(2, index, torch.where(filled, x, 0).to(whole.dtype))
        return whole

    def _seen(self) -> Tensor:
        """(batch, kv_heads, length) bool: slots that hold a token."""
        batch, heads = self.tail_keys.shape[:2]
        count = torch.zeros(
            batch, heads, self.length, dtype=torch.uint8, device=self.tail_keys.device
        )
        for part in self.parts():
            at = part.slots.positions(part.device).expand(batch, part.kv_heads, -1)
            at = spread(at, part.heads, heads, -1)
            count.scatter_add_(2, at.clamp(min=0), (at >= 0).to(torch.uint8))
        return count.bool()
