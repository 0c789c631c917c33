"""The compressed past of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexusquant.slots import BatchFn, Slots
from nexusquant.tokens import CodedTokens, ExactTokens, count_heads

_WORTH_A_COPY = 32


@dataclass(frozen=True)
class Stored:
    """The compressed past of one layer. Immutable.

    Attributes:
        sinks: first tokens, uncoded.
        body: everything else: tiers of codes, most important first, or one set of uncoded tokens;
            behind them what only some heads have (`split_heads`), with codes tier by tier.
        fresh: decoded tokens that have been followed by few others, at more bits, all behind those
            of the body; in the code space of its last tiers.
    """

    sinks: ExactTokens | None = None
    body: tuple[CodedTokens, ...] | tuple[ExactTokens, ...] = ()
    fresh: CodedTokens | None = None

    def parts(self) -> Iterator[CodedTokens | ExactTokens]:
        """What holds tokens."""
        if self.sinks is not None:
            yield self.sinks
        yield from (part for part in self.body if part.slots.count)
        if self.fresh is not None:
            yield self.fresh

    def map(self, fn: BatchFn) -> Stored:
        """Apply a batch operation to everything stored."""
        done: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:  # all parts share their centres, and go on sharing them
            if id(x) not in done:
                done[id(x)] = fn(x)
            return done[id(x)]

        return replace(
            self.with_body([part.map(once) for part in self.body]),
            sinks=self.sinks and self.sinks.map(once),
            fresh=self.fresh and self.fresh.map(once),
        )

    def drop_before(self, slot: int) -> Stored:
        """Without the tokens before `slot`, once enough of them are worth a copy."""

        def rest(part: Any) -> Any:
            count = part.slots.leading_before(slot)
            worth = count >= _WORTH_A_COPY or count == part.slots.count
            return part.drop(count) if count and worth else part

        return self.with_body([rest(part) for part in self.body]).with_fresh(
            self.fresh and rest(self.fresh)
        )

    def fresh_from(self, stop: int) -> int:
        """Slot from which on all up to `stop`, the end of what is stored, are of fresh tokens."""
        if self.fresh is None:
            return stop
        others = [part.slots.stop for part in self.parts() if part is not self.fresh]
        return max(self.fresh.slots.start, *others)  # in padded rows others may reach beyond

    def before(self, slot: int) -> Stored:
        """Without the tokens from `slot` on, which must be fresh."""
        fresh = self.fresh
        if fresh is None or fresh.slots.stop <= slot:
            return self
        at = fresh.slots.positions(fresh.device)
        at = torch.where(at < slot, at, -1)
        used = (at >= 0).any(0).any(0).nonzero()
        width = int(used.max()) + 1 if len(used) else 0
        kept = fresh.part(slice(0, width)).owned()
        return self.with_fresh(replace(kept, slots=Slots.of(at[..., :width])))

    def with_body(self, body: Sequence[Any]) -> Stored:
        """With another body, less what only some heads had."""
        body = [part for part in body if part.slots.count or part.heads is None]
        return replace(self, body=tuple(body))

    def with_fresh(self, fresh: CodedTokens | None) -> Stored:
        """With other fresh tokens, or none."""
        return replace(self, fresh=fresh if fresh is not None and fresh.slots.count else None)

    @property
    def count(self) -> float:
        """Entries per head, of the longest batch row; the mean if heads differ."""
        entries = sum(part.slots.count * part.kv_heads for part in self.parts())
        return entries / self.kv_heads if entries else 0.0

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer. There must be a part."""
        return count_heads(self.body or ([] if self.sinks is None else [self.sinks]))
