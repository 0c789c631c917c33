"""The uncoded end of a layer's cache, and what an attention call over it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.accounting import owned
from nexusquant.compressor import Chunk
from nexusquant.residual import OutputSide
from nexusquant.retention import WINDOW
from nexusquant.tokens import narrowed


@dataclass(frozen=True)
class Call:
    """One attention call of a layer, as far as compression needs it.

    Args:
        query: (batch, query_heads, q_len, dim) post-RoPE, of the last q_len tail tokens.
        valid: (batch, tail) bool, False for padding; None if all are real.
        scaling: factor on the logits.
        softcap: logit soft cap, if the model has one.
        output: where the attention's output goes; without it no profile is built from this call.
        received: (batch, kv_heads, tail), largest attention weight in a second pass, if there was
            one.
    """

    query: Tensor
    valid: Tensor | None
    scaling: float
    softcap: float | None
    output: Callable[[], OutputSide] | None = None
    received: Tensor | None = None

    def fills(self, tail: Tail, least: int) -> bool:
        """Whether some row of the tail has so many real tokens."""
        if self.valid is None or tail.count < least:
            return tail.count >= least
        return int(self.valid.sum(-1).max()) >= least

    def chunk(self, tail: Tail, start: int, layer_idx: int, least: int) -> Chunk:
        """The tail as a chunk to compress; too few queries are no guide to what matters."""
        queries = self.query[:, :, -tail.count :] if self.query.shape[2] >= least else None
        return Chunk(
            tail.keys, tail.values, start, self.valid, queries, self.scaling, self.softcap,
            layer_idx, self.received,
        )  # fmt: skip

    def without_last(self, count: int) -> Call:
        """As if the last `count` tokens had not been there."""
        if not count:
            return self
        valid = None if self.valid is None else self.valid[:, : self.valid.shape[1] - count]
        kept = max(self.query.shape[2] - count, 0)
        return replace(self, query=self.query[:, :, :kept], valid=valid)


@dataclass(frozen=True)
class Tail:
    """Uncoded tokens behind the stored ones. Immutable.

    Args:
        keys, values: (batch, kv_heads, tokens, dim), keys post-RoPE.
        queries: the latest queries, (batch, query_heads, n, dim), kept shortly before
            `max_tokens` and from there on: they decide what leaves.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens."""
        return self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> Tail:
        """With more tokens behind."""
        pairs = (self.keys, keys), (self.values, values)
        both = [torch.cat([old.to(new.dtype), new], 2) for old, new in pairs]
        return replace(self, keys=both[0], values=both[1])

    def detached(self) -> Tail:
        """Outside of autograd."""
        return replace(self, keys=self.keys.detach(), values=self.values.detach())

    def without_last(self, count: int) -> Tail:
        """Views without the last `count` tokens."""
        kept = self.count - count
        return replace(self, keys=self.keys[:, :, :kept], values=self.values[:, :, :kept])

    def without_first(self, count: int) -> Tail:
        """Without the first `count` tokens, in storage of its own."""
        keys, values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        return replace(self, keys=keys, values=values)

    def emptied(self) -> Tail:
        """No tokens, in fresh storage: a view would keep that of the whole prompt alive."""
        keys, values = (torch.empty_like(x[:, :, :0]) for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def owned(self) -> Tail:
        """In storage of its own."""
        return replace(self, keys=owned(self.keys), values=owned(self.values))

    def narrowed(self) -> Tail:
        """In 16 bits where that does not overflow, in storage of its own."""
        if self.keys.dtype.itemsize <= 2:
            return self.owned()
        keys, values = (narrowed(x, torch.float16) for x in (self.keys, self.values))
        return replace(self, keys=owned(keys), values=owned(values))

    def remember(self, query: Tensor) -> Tail:
        """With the latest queries, in 16 bits."""
        held = [] if self.queries is None else [self.queries]
        latest = query[:, :, -WINDOW:]
        if latest.dtype.itemsize > 2:
            latest = narrowed(latest, torch.float16)
        return replace(self, queries=torch.cat([*held, latest], 2)[:, :, -WINDOW:].clone())

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tail:
        """Apply a batch operation."""
        queries = None if self.queries is None else fn(self.queries)
        return Tail(fn(self.keys), fn(self.values), queries)
