"""Which slots of the cache are occupied, in as few bytes as that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BatchFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Slots:
    """Logical positions in the cache of stored tokens, ascending, per batch row and head.

    A contiguous run needs no storage. Otherwise either the gaps between neighbours are stored, in
    one byte where they fit, or one bit per slot of the span, whichever is smaller. The first gap
    counts from `start - 1`; gap 0 marks an empty entry (rows that hold fewer tokens than the
    longest). The bitmap has no place for those but behind a row's last one.
    """

    start: int
    count: int
    gaps: Tensor | None = None  # (batch, heads or 1, count)
    bitmap: Tensor | None = None  # (batch, heads or 1, bytes) uint8, bit i of byte j: slot 8 j + i
    last: int = -1  # no slot is larger, if any are stored

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
        count = index.shape[-1]
        if last - start + 1 == count and bool((gaps == 1).all()):
            return Slots(start, count)
        narrow, span = _narrow(gaps), -(-(last - start + 1) // 8)
        trailing = not bool((empty[..., :-1] & ~empty[..., 1:]).any())
        if trailing and span < count * narrow.element_size():
            return Slots(start, count, bitmap=_bitmap(index - start, empty, span), last=last)
        return Slots(start, count, narrow, last=last)

    @property
    def stored(self) -> Tensor | None:
        """The one tensor there is, if any."""
        return self.gaps if self.gaps is not None else self.bitmap

    @property
    def stop(self) -> int:
        """All slots are below."""
        return self.start + self.count if self.stored is None else self.last + 1

    def positions(self, device: torch.device) -> Tensor:
        """(batch or 1, heads or 1, count) int64; -1 where empty."""
        if self.gaps is not None:
            at = self.gaps.cumsum(-1, dtype=torch.int64) + (self.start - 1)
            return torch.where(self.gaps == 0, -1, at)
        if self.bitmap is not None:
            return _set_bits(self.bitmap, self.count, self.start)
        return torch.arange(self.start, self.start + self.count, device=device).view(1, 1, -1)

    def append(self, other: Slots, batch: int) -> Slots:
        """The slots of both; `other` lies entirely behind. Empty entries stay where they are."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        contiguous = self.stored is None and other.stored is None
        if contiguous and other.start == self.start + self.count:
            return Slots(self.start, self.count + other.count)
        one = self.stored if self.stored is not None else other.stored
        device = one.device if one is not None else torch.device("cpu")
        mine, theirs = (s.positions(device) for s in (self, other))
        wide = max(mine.shape[1], theirs.shape[1])
        return Slots.of(torch.cat([x.expand(batch, wide, -1) for x in (mine, theirs)], -1))

    def drop(self, count: int) -> Slots:
        """Without the first `count` entries."""
        if self.stored is None:
            return Slots(self.start + count, self.count - count)
        return Slots.of(self.positions(self.stored.device)[..., count:])

    def leading_before(self, slot: int) -> int:
        """How many leading entries lie before `slot` (or are empty) in every row and head."""
        if self.stored is None:
            return max(0, min(self.count, slot - self.start))
        old = (self.positions(self.stored.device) < slot).all(0).all(0)
        return int(old.long().cumprod(0).sum())

    def map(self, fn: BatchFn) -> Slots:
        """Apply a batch operation."""
        if self.gaps is not None:
            return replace(self, gaps=fn(self.gaps))
        return self if self.bitmap is None else replace(self, bitmap=fn(self.bitmap))


def _narrow(gaps: Tensor) -> Tensor:
    """The gaps in the smallest unsigned or signed type that holds them all."""
    largest = int(gaps.max()) if gaps.numel() else 0
    dtype = torch.uint8 if largest < 256 else torch.int16 if largest < 32768 else torch.int32
    return gaps.to(dtype).contiguous()


def _bitmap(offset: Tensor, empty: Tensor, width: int) -> Tensor:
    """offset (batch, heads, count) from the first slot -> (batch, heads, width) uint8."""
    bits = torch.zeros(*offset.shape[:-1], 8 * width + 1, dtype=torch.uint8, device=offset.device)
    bits.scatter_(-1, torch.where(empty, 8 * width, offset), 1)  # the last column is cut off
    weight = 1 << torch.arange(8, dtype=torch.uint8, device=offset.device)
    return (bits[..., :-1].unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)


def _set_bits(bitmap: Tensor, count: int, start: int) -> Tensor:
    """Inverse of `_bitmap`: (batch, heads, count) int64 slots, -1 behind a row's last one."""
    shift = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    ones = ((bitmap[..., None] >> shift) & 1).flatten(-2)
    entry = torch.where(ones > 0, ones.cumsum(-1, dtype=torch.int64) - 1, count)
    out = torch.full((*bitmap.shape[:-1], count + 1), -1, dtype=torch.int64, device=bitmap.device)
    slot = torch.arange(start, start + ones.shape[-1], device=bitmap.device).expand(ones.shape)
    return out.scatter_(-1, entry, slot)[..., :count]
