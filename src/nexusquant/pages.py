"""Pages of keys: which slots share a rotation, and the rotations as one matrix.

Queries in a page's frame are linear in the cosines and sines at its start, so for all pages they
are `turns` times a small matrix of the query (`nexusquant.kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.math.rope import ApplyRope, RopeTable, Span, rotated_dims, tiled

_PLAIN = 256  # slots of a page where nothing rotates
_TOGETHER = 16  # pages are padded to a multiple of so many


@dataclass(frozen=True)
class Pages:
    """The pages of a cache, per batch row (or of all, if they are alike).

    Attributes:
        turns: (batch or 1, 2 F + 1, pages) fp32: cosines and sines of F frequencies at the start
            of each page, and ones. Zeros behind the last page, up to a multiple of 16.
        page_of: (batch or 1, slots) int32.
        rotary: (dim, 3) int32: what rotates every dimension: frequency (-1: none), partner and
            sign, out_i = x_i cos + sign x_partner sin.
        count: pages of the longest row.
    """

    turns: Tensor
    page_of: Tensor
    rotary: Tensor
    count: int

    @property
    def slots(self) -> int:
        """Slots known."""
        return self.page_of.shape[1]


def pages_of(frame: KeyFrame, slots: int, dim: int, device: torch.device) -> Pages | None:
    """Pages of at least `slots` slots; None if the model's rotation is not of a known form."""
    if frame.table is None or not frame.rotates:
        return _unrotated(-(-slots // _PLAIN) * _PLAIN, dim, device)
    key = "pages", frame.page, dim
    if key not in frame.workspace:
        frame.workspace[key] = _rotated(frame.table, frame.page, dim)
    pages: Pages | None = frame.workspace[key]
    return pages


@lru_cache(maxsize=8)
def _unrotated(slots: int, dim: int, device: torch.device) -> Pages:
    count = slots // _PLAIN
    turns = torch.zeros(1, 1, -(-count // _TOGETHER) * _TOGETHER, device=device)
    turns[..., :count] = 1
    page_of = torch.arange(slots, dtype=torch.int32, device=device)[None] // _PLAIN
    rotary = torch.tensor([[-1, 0, 0]] * dim, dtype=torch.int32, device=device)
    return Pages(turns, page_of, rotary, count)


def _rotated(table: RopeTable, page: int, dim: int) -> Pages | None:
    width = table.spans[0].width
    structure = _structure(table.apply, width, dim)
    if structure is None:
        return None
    column, partner, sign = structure
    repeats = {(span.tiling, span.frequencies is None) for span in table.spans}
    kind, loose = repeats.pop()
    # Of rows of unknown origin, every column is for itself.
    column_of = torch.arange(width) if repeats or loose else tiled(kind, width)
    used = [int((column_of == f).nonzero()[0]) for f in range(int(column_of.max()) + 1)]
    found = [_pages_of_span(span, page) for span in table.spans]
    batch = max(len(ids) for ids, _, _ in found)
    offset = found[0][0].new_zeros(batch, 1)
    page_of, begins = [], []
    for ids, _, _ in found:
        page_of.append(ids + offset)
        begins.append(offset)
        offset = offset + ids[:, -1:] + 1
    count = int(offset.max())
    cos = found[0][1]
    turns = cos.new_zeros(batch, 2 * len(used) + 1, -(-count // _TOGETHER) * _TOGETHER)
    for begin, (ids, cos, sin) in zip(begins, found, strict=True):
        here = torch.arange(cos.shape[1], device=cos.device)
        own = (here <= ids[:, -1:])[..., None]  # a row with fewer pages adds zeros to others
        index = (begin + here).clamp(max=count - 1).long()[:, None].expand(-1, len(used), -1)
        for k, rows in ((0, cos), (len(used), sin)):
            rows = torch.where(own, rows[..., used], 0).expand(batch, -1, -1)
            turns[:, k : k + len(used)].scatter_add_(2, index, rows.mT)
    turns[:, -1, :count] = 1
    device = turns.device
    frequency = torch.full((dim,), -1)
    frequency[: len(column)] = column_of[column]
    other, factor = torch.zeros(2, dim, dtype=torch.long)
    other[: len(column)], factor[: len(column)] = partner, sign
    rotary = torch.stack([frequency, other, factor], 1).to(device, torch.int32)
    return Pages(turns, torch.cat(page_of, 1).contiguous(), rotary, count)


def _pages_of_span(span: Span, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Page of every slot, from 0, (batch or 1, slots) int32; cos and sin of pages, (.., width)."""
    if span.positions is None or page <= 1:
        cos, sin = (x.float() for x in span.cos_sin())
        slots = torch.arange(cos.shape[1], dtype=torch.int32, device=cos.device)
        return slots[None].expand(len(cos), -1), cos, sin
    start = torch.div(span.positions, page, rounding_mode="floor") * page
    new = start.diff(dim=1, prepend=start[:, :1] - 1) != 0
    ids = new.cumsum(1, dtype=torch.int32) - 1
    starts = start.new_zeros(len(ids), int(ids.max()) + 1).scatter_(1, ids.long(), start)
    cos, sin = span.cos_sin(starts)
    return ids, cos, sin


@lru_cache(maxsize=64)
def _structure(apply: ApplyRope, width: int, dim: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Column, partner and sign of every rotated dimension, found by trying; None if it has no such
    form."""
    dims = rotated_dims(apply, width, dim)
    numbers, ones = torch.arange(1.0, dims + 1), torch.ones(dims)
    columns, unit, none = torch.arange(1.0, width + 1), torch.ones(width), torch.zeros(width)

    def out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shaped = x.view(1, 1, 1, dims)
        return apply(shaped, shaped, cos.view(1, 1, -1), sin.view(1, 1, -1))[1].view(dims).float()

    column = out(ones, columns, none).round().long() - 1
    turned = out(numbers, none, unit)
    partner, sign = turned.abs().round().long() - 1, turned.sign().long()
    if not all(bool((i >= 0).all() & (i < n).all()) for i, n in ((column, width), (partner, dims))):
        return None
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(n, generator=generator) for n in (dims, width, width))
    expected = x * cos[column] + sign * x[partner] * sin[column]
    if not torch.allclose(out(x, cos, sin), expected, rtol=1e-3, atol=1e-4):
        return None
    return column, partner, sign
