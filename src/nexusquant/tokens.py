"""Stored tokens of one layer: which slots they hold, uncoded (`ExactTokens`) or as codes.

All containers are immutable; `append` and `map` return new ones, so a reader's view never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.quantizer import Codes, Quantizer

BatchFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Slots:
    """Logical positions in the cache of stored tokens, ascending, per batch row and head.

    A contiguous run needs no storage. Otherwise the gaps between neighbours are stored, in one
    byte where they fit; the first counts from `start - 1`, and gap 0 marks an empty entry (rows
    that hold fewer tokens than the longest).
    """

    start: int
    count: int
    gaps: Tensor | None = None  # (batch, heads or 1, count)

    @staticmethod
    def of(index: Tensor) -> Slots:
        """From positions (batch, heads, count) int64; -1 marks empty entries, at the end."""
        if index.shape[-1] == 0:
            return Slots(0, 0)
        empty = index < 0
        start = int(index.masked_fill(empty, torch.iinfo(index.dtype).max).min())
        last = int(index.max())
        if last < 0:  # nothing but empty entries
            return Slots(0, index.shape[-1], torch.zeros_like(index, dtype=torch.uint8))
        filled = torch.where(empty, start - 1, index).cummax(-1).values
        gaps = filled.diff(dim=-1, prepend=torch.full_like(filled[..., :1], start - 1))
        if last - start + 1 == index.shape[-1] and bool((gaps == 1).all()):
            return Slots(start, index.shape[-1])
        return Slots(start, index.shape[-1], _narrow(gaps))

    def positions(self, device: torch.device) -> Tensor:
        """(batch or 1, heads or 1, count) int64; -1 where empty."""
        if self.gaps is None:
            return torch.arange(self.start, self.start + self.count, device=device).view(1, 1, -1)
        at = self.gaps.cumsum(-1, dtype=torch.int64) + (self.start - 1)
        return torch.where(self.gaps == 0, -1, at)

    def append(self, other: Slots, batch: int) -> Slots:
        """The slots of both; `other` lies entirely behind."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        contiguous = self.gaps is None and other.gaps is None
        if contiguous and other.start == self.start + self.count:
            return Slots(self.start, self.count + other.count)
        one = self.gaps if self.gaps is not None else other.gaps
        device = one.device if one is not None else torch.device("cpu")
        mine, theirs = (s.positions(device) for s in (self, other))
        wide = max(mine.shape[1], theirs.shape[1])
        mine, theirs = (x.expand(batch, wide, -1) for x in (mine, theirs))
        first = mine.clamp(min=self.start - 1).amax(-1, keepdim=True)
        seen = torch.cat([first, theirs.clamp(min=self.start - 1)], -1).cummax(-1).values
        tail = seen.diff(dim=-1)  # 0 where empty: the running maximum stands still
        head = self._dense_gaps(device).expand(batch, wide, -1)
        return replace(
            self,
            count=self.count + other.count,
            gaps=_narrow(torch.cat([head.long(), tail], -1)),
        )

    def _dense_gaps(self, device: torch.device) -> Tensor:
        if self.gaps is not None:
            return self.gaps
        return torch.ones(1, 1, self.count, dtype=torch.uint8, device=device)

    def drop(self, count: int) -> Slots:
        """Without the first `count` entries."""
        if self.gaps is None:
            return Slots(self.start + count, self.count - count)
        return Slots.of(self.positions(self.gaps.device)[..., count:])

    def leading_before(self, slot: int) -> int:
        """How many leading entries lie before `slot` (or are empty) in every row and head."""
        if self.gaps is None:
            return max(0, min(self.count, slot - self.start))
        old = (self.positions(self.gaps.device) < slot).all(0).all(0)
        return int(old.long().cumprod(0).sum())

    def map(self, fn: BatchFn) -> Slots:
        """Apply a batch operation."""
        return self if self.gaps is None else replace(self, gaps=fn(self.gaps))


def _narrow(gaps: Tensor) -> Tensor:
    """The gaps in the smallest unsigned or signed type that holds them all."""
    largest = int(gaps.max()) if gaps.numel() else 0
    dtype = torch.uint8 if largest < 256 else torch.int16 if largest < 32768 else torch.int32
    return gaps.to(dtype).contiguous()


def _fits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, or unchanged if that would overflow."""
    y = x.to(dtype)
    return y if dtype == x.dtype or bool(torch.isfinite(y).all()) else x


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (batch, heads, tokens, dim) at index (batch, heads or 1, n); -1 reads token 0."""
    index = index.clamp(min=0).expand(-1, x.shape[1], -1)
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


@dataclass(frozen=True)
class ExactTokens:
    """Tokens stored as they are: keys (post-RoPE) and values, (batch, heads, tokens, dim)."""

    keys: Tensor
    values: Tensor
    slots: Slots

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.keys.device

    @staticmethod
    def select(
        keys: Tensor, values: Tensor, index: Tensor, start: int, dtype: torch.dtype
    ) -> ExactTokens:
        """The tokens at `index` (batch, heads or 1, n; -1 empty) of a chunk from slot `start`."""
        empty = (index < 0)[..., None]  # zeros, as the token read instead may be NaN padding
        keys, values = (
            _fits(gather_tokens(x, index).masked_fill(empty, 0), dtype).contiguous()
            for x in (keys, values)
        )
        return ExactTokens(keys, values, Slots.of(torch.where(index < 0, -1, index + start)))

    def append(self, other: ExactTokens) -> ExactTokens:
        """The tokens of both; `other` lies behind."""
        batch = self.keys.shape[0]
        return ExactTokens(
            torch.cat([self.keys, other.keys.to(self.keys.dtype)], 2),
            torch.cat([self.values, other.values.to(self.values.dtype)], 2),
            self.slots.append(other.slots, batch),
        )

    def drop(self, count: int) -> ExactTokens:
        """Without the first `count` entries, in storage of its own."""
        keys, values = (x[:, :, count:].clone() for x in (self.keys, self.values))
        return ExactTokens(keys, values, self.slots.drop(count))

    def map(self, fn: BatchFn) -> ExactTokens:
        """Apply a batch operation (reorder, repeat, select) to everything stored."""
        return ExactTokens(fn(self.keys), fn(self.values), self.slots.map(fn))


@dataclass(frozen=True)
class CodedTokens:
    """Tokens stored as codes. Keys are in the frame of `KeyFrame`; means are per batch row."""

    keys: Codes
    values: Codes
    key_mean: Tensor  # (batch, heads, 1, dim) fp16
    value_mean: Tensor
    slots: Slots
    key_quantizer: Quantizer
    value_quantizer: Quantizer

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.keys.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.keys.rows.device

    def append(self, other: CodedTokens) -> CodedTokens:
        """The tokens of both, which must share means and quantizers; `other` lies behind."""
        batch = self.keys.rows.shape[0]
        return replace(
            self,
            keys=self.keys.append(other.keys),
            values=self.values.append(other.values),
            slots=self.slots.append(other.slots, batch),
        )

    def drop(self, count: int) -> CodedTokens:
        """Without the first `count` entries, in storage of its own."""
        rest = slice(count, None)
        keys, values = (x.part(rest).map(torch.clone) for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values, slots=self.slots.drop(count))

    def map(self, fn: BatchFn) -> CodedTokens:
        """Apply a batch operation (reorder, repeat, select) to everything stored."""
        return replace(
            self,
            keys=self.keys.map(fn),
            values=self.values.map(fn),
            key_mean=fn(self.key_mean),
            value_mean=fn(self.value_mean),
            slots=self.slots.map(fn),
        )
