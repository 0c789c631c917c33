"""Attention masks, in terms of the cache's slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASKED = float("-inf")


@dataclass(frozen=True)
class Mask:
    """Who may look at whom, in whatever form the model's attention function received it.

    Args:
        tensor: None (causal), (batch, columns) bool or int (padding), or (batch, heads or 1,
            q_len, columns) bool or additive float.
        query_slot: slot of the first query.
        first_column: slot (>= 0) that column 0 stands for; earlier slots are out of sight.
        window: sliding window in tokens, the query's own included; None for no window.
    """

    tensor: Tensor | None
    query_slot: int
    first_column: int = 0
    window: int | None = None

    def bias(self, slots: Tensor, q_len: int, kv_heads: int) -> Tensor:
        """What to do at `slots` (batch or 1, heads or 1, n; -1 = empty).

        Returns bool (True = visible) or additive float, broadcastable to (batch, kv_heads, group,
        q_len, n).
        """
        column = (slots - self.first_column)[:, :, None, None]  # negative where empty
        if self.tensor is None or self.tensor.ndim == 2:
            query = torch.arange(self.query_slot, self.query_slot + q_len, device=slots.device)
            query = query[:, None] - self.first_column
            seen = (column >= 0) & (column <= query)
            if self.window is not None:
                seen = seen & (column > query - self.window)
            if self.tensor is not None:
                seen = seen & self._columns(self.tensor[:, None, None, None].bool(), column, False)
            return seen
        mask = self.tensor
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
        hidden = False if mask.dtype == torch.bool else _MASKED
        return self._columns(mask, column, hidden)

    def of_heads(self, heads: tuple[int, ...], kv_heads: int) -> Mask:
        """For queries of some of the KV heads only."""
        mask = self.tensor
        if mask is None or mask.ndim == 2 or mask.shape[1] == 1:
            return self
        return replace(self, tensor=mask.unflatten(1, (kv_heads, -1))[:, list(heads)].flatten(1, 2))

    def _columns(self, mask: Tensor, column: Tensor, hidden: bool | float) -> Tensor:
        """mask (batch, h, g, q, columns) read at `column` (b, h, 1, 1, n), `hidden` outside."""
        width = mask.shape[-1]
        inside = (column >= 0) & (column < width)
        index = column.clamp(0, max(width - 1, 0))
        lead = torch.broadcast_shapes(mask.shape[:-1], index.shape[:-1])
        picked = mask.expand(*lead, width).gather(-1, index.expand(*lead, index.shape[-1]))
        return picked.masked_fill(~inside, hidden)

    def hides_nothing(self, q_len: int, stop: int) -> bool:
        """Whether all queries may look at all slots below `stop`."""
        plain = self.tensor is None and self.window is None and not self.first_column
        return plain and q_len == 1 and stop <= self.query_slot + 1

    def columns(self, q_len: int) -> Tensor:
        """What to add to logits, column by column: (batch or 1, heads or 1, q_len, n) fp32.

        The heads are query heads. Columns beyond those given are out of sight.
        """
        mask = self.tensor
        if mask is None or mask.ndim == 2:
            count = self.query_slot + q_len - self.first_column
            device = None if mask is None else mask.device
            query = torch.arange(count - q_len, count, device=device)[:, None]
            count = max(count, 1)
            at = torch.arange(count, device=device)
            seen = at <= query
            if self.window is not None:
                seen = seen & (at > query - self.window)
            if mask is not None:
                known = torch.zeros(len(mask), count, dtype=torch.bool, device=mask.device)
                known[:, : mask.shape[1]] = mask[:, :count].bool()
                seen = seen & known[:, None]
            mask = seen[None, None] if seen.ndim == 2 else seen[:, None]
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, _MASKED)
        return mask.float()
