"""Rotary embeddings seen from the cache: which rotation every slot received, and its inverse.

The model's own function does the rotating (`ApplyRope`), so layouts (split halves, interleaved,
partial) need no code here. Removal is the same function with -sin, divided by cos^2 + sin^2, which
also undoes an attention scaling (YaRN). Rows are captured when tokens enter the cache, because
dynamic and longrope tables change afterwards; where a row is cos(p f) only p and f are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

ApplyRope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, cos, sin) -> (q, k): q, k (batch, heads, tokens, dim); cos, sin (batch, tokens, width)."""

Frequencies = tuple[Tensor, float]
"""Inverse frequencies (width / 2,) in radians per position, and the scaling of cos and sin."""

_TILINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda x: torch.cat([x, x], -1),
    "pairs": lambda x: x.repeat_interleave(2, -1),
    "once": lambda x: x,
}


def tiled(tiling: str, width: int) -> Tensor:
    """(width,) int64: which frequency a column of the rows belongs to."""
    count = width if tiling == "once" else width // 2
    return _TILINGS[tiling](torch.arange(count))


@dataclass(frozen=True)
class Span:
    """Rows of consecutive slots: positions and frequencies, or else the rows themselves."""

    positions: Tensor | None = None  # (batch or 1, tokens) int32
    frequencies: Tensor | None = None  # (width / 2,) fp32
    scaling: float = 1.0
    tiling: str = "halves"
    rows: tuple[Tensor, Tensor] | None = None  # cos, sin (batch or 1, tokens, width)

    @property
    def length(self) -> int:
        """Slots covered."""
        stored = self.positions if self.positions is not None else self.cos_sin()[0]
        return stored.shape[1]

    @property
    def batch(self) -> int:
        """Rows of the batch, 1 if all are alike."""
        return len(self.positions if self.positions is not None else self.cos_sin()[0])

    @property
    def width(self) -> int:
        """Columns of a row."""
        if self.rows is not None:
            return self.rows[0].shape[-1]
        assert self.frequencies is not None
        return len(self.frequencies) * (1 if self.tiling == "once" else 2)

    def cos_sin(self, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin at `positions` (default: its own), each (batch or 1, tokens, width)."""
        if self.rows is not None:
            return self.rows
        assert self.positions is not None
        assert self.frequencies is not None
        where = self.positions if positions is None else positions
        angle = _TILINGS[self.tiling](where[..., None].float() * self.frequencies)
        return angle.cos() * self.scaling, angle.sin() * self.scaling

    def anchored(self, page: int) -> tuple[Tensor, Tensor]:
        """Rows at the start of each slot's page (stored rows know only their own position)."""
        if self.positions is None or page <= 1:
            return self.cos_sin()
        return self.cos_sin(torch.div(self.positions, page, rounding_mode="floor") * page)

    def cut(self, length: int) -> Span:
        """The first `length` slots, in storage of their own."""
        if self.rows is not None:
            cos, sin = (row[:, :length].clone() for row in self.rows)
            return replace(self, rows=(cos, sin))
        assert self.positions is not None
        return replace(self, positions=self.positions[:, :length].clone())

    def join(self, other: Span) -> Span | None:
        """Both as one span, or None if they do not rotate alike."""
        if self.rows is not None and other.rows is not None:
            return Span(rows=(_cat(self.rows[0], other.rows[0]), _cat(self.rows[1], other.rows[1])))
        alike = (
            (self.scaling, self.tiling) == (other.scaling, other.tiling)
            and self.frequencies is not None
            and other.frequencies is not None
            and torch.equal(self.frequencies, other.frequencies)
        )
        if not alike or self.positions is None or other.positions is None:
            return None
        return replace(self, positions=_cat(self.positions, other.positions))

    def map(self, fn: Callable[[Tensor], Tensor], batch: int) -> Span:
        """Apply a batch operation to what is stored per batch row."""
        if self.rows is not None:
            cos, sin = self.rows
            return self if len(cos) != batch else Span(rows=(fn(cos), fn(sin)))
        assert self.positions is not None
        if len(self.positions) != batch or batch == 1:
            return self
        return replace(self, positions=fn(self.positions))


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate along the slots; a batch of one is the same row for all."""
    rows = max(len(a), len(b))
    return torch.cat([x.expand(rows, *x.shape[1:]) for x in (a, b)], 1)


def capture(cos: Tensor, sin: Tensor, positions: Tensor, candidates: Iterable[Frequencies]) -> Span:
    """The span of captured rows, compact if some candidate frequencies reproduce them exactly.

    Args:
        cos, sin: (batch or 1, tokens, width), as the model passed them to its attention.
        positions: (batch or 1, tokens) int, the likely RoPE positions.
        candidates: frequencies to try, such as those found in the model's rotary modules.
    """
    if all(bool((x == x[:1]).all()) for x in (positions, cos, sin)):
        cos, sin, positions = cos[:1], sin[:1], positions[:1]
    tolerance = max(1e-5, torch.finfo(cos.dtype).eps)
    for frequencies, scaling in candidates:
        for tiling in _TILINGS:
            where = positions.to(cos.device, torch.int32)
            known = frequencies.detach().to(cos.device, torch.float32, copy=True)
            span = Span(where, known, scaling, tiling)
            mine, my_sin = span.cos_sin()
            if mine.shape[1:] != cos.shape[1:] or len(mine) not in (1, len(cos)):
                continue
            near = torch.allclose(mine.to(cos.dtype).float(), cos.float(), rtol=0, atol=tolerance)
            if near and torch.allclose(
                my_sin.to(sin.dtype).float(), sin.float(), rtol=0, atol=tolerance
            ):
                return span
    return Span(rows=(cos.detach().clone(), sin.detach().clone()))


def rotate(apply: ApplyRope, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotate (or un-rotate) x (batch, heads, tokens, dim) by its own rows, in fp32.

    cos, sin: (batch, heads or 1, tokens, width), of all heads or of each. Dimensions beyond the
    rotated ones pass through.
    """
    shape, dim = x.shape, x.shape[-1]
    cos, sin = cos.float(), sin.float()
    width = rotated_dims(apply, cos.shape[-1], dim)
    if cos.shape[1] > 1:  # heads at different positions are different sequences
        x, cos, sin = (t.flatten(0, 1)[:, None] for t in (x, cos, sin))
    cos, sin = cos[:, 0], sin[:, 0]
    turns, rest = x[..., :width].float(), x[..., width:].float()
    some = x.shape[1] // 2  # the functions take queries and keys; both are vectors to them
    turned = torch.cat(apply(turns[:, :some], turns[:, some:], cos, -sin if inverse else sin), 1)
    if inverse:
        size = cos[:, None, :, :1].square() + sin[:, None, :, :1].square()
        if bool(((size - 1).abs() > 1e-6).any()):  # an attention scaling (YaRN)
            turned = turned / size
    return (torch.cat([turned, rest], -1) if rest.shape[-1] else turned).view(shape)


@lru_cache(maxsize=64)
def rotated_dims(apply: ApplyRope, width: int, dim: int) -> int:
    """How many leading dims `apply` takes for rows of `width`: width, or twice that (gpt-oss)."""
    for dims in (width, 2 * width):
        if dims > dim:
            continue
        x, row = torch.ones(1, 1, 1, dims), torch.ones(1, 1, width)
        try:
            if apply(x, x, row, row)[1].shape == x.shape:
                return dims
        except (RuntimeError, ValueError):
            continue
    raise ValueError(f"rows of width {width} do not fit vectors of {dim}")


class RopeTable:
    """Which rotation each slot of one cache received; shared by the layers of one RoPE flavour."""

    def __init__(self, apply: ApplyRope) -> None:
        self.apply = apply
        self.spans: list[Span] = []

    @property
    def length(self) -> int:
        """Slots known."""
        return sum(span.length for span in self.spans)

    def extend(self, past: int, span: Span) -> None:
        """Record the rows of slots past, past + 1, ...; forgets slots from `past` on first.

        Raises:
            ValueError: rows of slots before `past` are missing.
        """
        if past > self.length:
            raise ValueError(f"rows of slots {self.length} to {past - 1} were never recorded")
        self.truncate(past)
        last = self.spans[-1] if self.spans else None
        if last is not None and span.length == 1 and last.join(span) is None:
            # Dynamic scaling has new frequencies for every decoded token: rows take less.
            span = Span(rows=span.cos_sin())
        joined = last.join(span) if last is not None else None
        if joined is not None:
            self.spans[-1] = joined
        else:
            self.spans.append(span)

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on."""
        kept: list[Span] = []
        for span in self.spans:
            room = length - sum(s.length for s in kept)
            if room > 0:
                kept.append(span if span.length <= room else span.cut(room))
        self.spans = kept

    def map(self, fn: Callable[[Tensor], Tensor], batch: int) -> None:
        """Apply a batch operation to a cache of `batch` rows."""
        self.spans = [span.map(fn, batch) for span in self.spans]

    def of_row(self, row: int) -> RopeTable:
        """The table of one batch row."""
        one = RopeTable(self.apply)
        one.spans = [span.map(lambda x: x[row : row + 1], span.batch) for span in self.spans]
        return one

    def rows(self, page: int) -> tuple[Tensor, Tensor]:
        """cos, sin (batch or 1, length, width) fp32 at the start of every slot's page."""
        parts = [span.anchored(page) for span in self.spans]
        cos, sin = parts[0]
        for more_cos, more_sin in parts[1:]:
            cos, sin = _cat(cos.float(), more_cos.float()), _cat(sin.float(), more_sin.float())
        return cos.float(), sin.float()

    def turn(self, x: Tensor, slots: Tensor, rows: tuple[Tensor, Tensor], inverse: bool) -> Tensor:
        """Rotate x (batch, heads, n, dim) at `slots` (batch or 1, heads or 1, n) by `rows`."""
        index = slots.clamp(min=0)
        batch = max(len(index), len(rows[0]))
        index = index.expand(batch, -1, -1)
        wide = [r.expand(batch, -1, -1)[:, None].expand(-1, index.shape[1], -1, -1) for r in rows]
        where = index[..., None].expand(-1, -1, -1, wide[0].shape[-1])
        cos, sin = (w.gather(2, where) for w in wide)
        return rotate(self.apply, x, cos, sin, inverse)

    def average_rotation(self, count: int, dim: int) -> Tensor | None:
        """Mean rotation over the next `count` positions, (batch or 1, dim, dim) fp32.

        M with M @ q = mean of R(p) q. R is linear in cos and sin, so their means suffice.
        None if the last rows are not known as a function of position.
        """
        last = self.spans[-1]
        if last.positions is None:
            return None
        ahead = torch.arange(1, count + 1, device=last.positions.device)
        cos, sin = last.cos_sin(last.positions[:, -1:] + ahead)
        cos, sin = (t.mean(1, keepdim=True).expand(-1, dim, -1)[:, None] for t in (cos, sin))
        basis = torch.eye(dim, dtype=torch.float32, device=cos.device).expand(len(cos), 1, dim, dim)
        return rotate(self.apply, basis, cos, sin, inverse=False)[:, 0].mT
