"""The parts of a cache as tables for the attention kernels, and the work that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexusquant.kernels.base import Coded, Exact
from nexusquant.kernels.gpu import attend, queries, tables
from nexusquant.kernels.plans import one_space
from nexusquant.slots import Slots

TILE = 64
"""Tokens that a program has at a time."""
PROGRAMS = 4096
"""About as many fill a large GPU."""
_BLOCK = 1024  # slots, or columns of a bitmap


@dataclass(frozen=True)
class Plan:
    """What stays the same from step to step while nothing is appended.

    Attributes:
        table: one line per coded part, see `attend`.
        tiles: of all parts together.
        work, split_part: see `attend.values` and `merge.merge`.
        places: entries of all parts whose slots are not contiguous.
        keep: what the addresses in the table point at.
    """

    table: Tensor
    tiles: int
    work: Tensor
    split_part: Tensor
    places: int
    keep: list[Tensor]


def make_plan(
    coded: Sequence[Coded], batch: int, kv_heads: int, device: torch.device
) -> Plan | None:
    """For these parts; None if they are not in one code space."""
    if not one_space(coded):
        return None
    keep: list[Tensor] = []
    table = torch.zeros(len(coded), attend.FIELDS.value, dtype=torch.int64)
    places, tiles = places_of(coded, table), [triton.cdiv(part.slots.count, TILE) for part in coded]
    for i, (row, part) in enumerate(zip(table, coded, strict=True)):
        row[attend.TILE.value] = sum(tiles[:i])
        put(row, attend.HEAD_MAP, tables.head_map(part.heads, kv_heads, device), keep)
        for x, at in ((part.key_rows, attend.KEYS), (part.value_rows, attend.VALUES)):
            x = put(row, at, x if x.stride(2) == 1 else x.contiguous(), keep)
            row[at.value + 1], row[at.value + 3] = x.stride(0), x.stride(1)
        gains = part.gains if part.gains.stride(2) == 1 else part.gains.contiguous()
        put(row, attend.GAINS, gains, keep)
        row[attend.GAIN_BATCH.value], row[attend.GAIN_HEAD.value] = gains.stride()[:2]
        width = 1 + max(map(tables.chunk_count, part.layouts))
        row[attend.CHUNKS.value] = width
        for layout, at in zip(part.layouts, (attend.KEY_CHUNKS, attend.VALUE_CHUNKS), strict=True):
            put(row, at, tables.chunk_table(layout, width, device), keep)
        put(row, attend.STORED, tables.stored_groups(part.layouts[1], device), keep)
    counts = [max(1, tables.chunk_count(part.layouts[1])) for part in coded]
    programs = sum(n * count for n, count in zip(tiles, counts, strict=True))
    each = max(1, triton.cdiv(programs * batch * kv_heads, PROGRAMS))
    work, split_part = [], list[int]()
    for i, count in enumerate(counts):
        begin, stop = sum(tiles[:i]), sum(tiles[: i + 1])
        for first in range(begin, stop, each):
            last = min(first + each, stop)
            work += [(i, len(split_part), first, last, chunk) for chunk in range(count)]
            split_part.append(i)
    return Plan(
        table.to(device), sum(tiles), torch.tensor(work, dtype=torch.int32, device=device),
        torch.tensor(split_part, dtype=torch.int32, device=device), places, keep,
    )  # fmt: skip


def places_of(parts: Sequence[Coded | Exact], table: Tensor) -> int:
    """Fills in where each part's slots are, and how many; entries of `PLACES`."""
    total = 0
    for row, part in zip(table, parts, strict=True):
        slots = part.slots
        row[attend.TOKENS.value], row[attend.SLOT_START.value] = slots.count, slots.start
        row[attend.SLOTS.value] = -1
        if slots.stored is not None:
            rows, heads = slots.stored.shape[:2]
            row[attend.SLOTS.value] = total
            row[attend.SLOT_BATCH.value] = 0 if rows == 1 else heads * slots.count
            row[attend.SLOT_HEAD.value] = 0 if heads == 1 else slots.count
            total += rows * heads * slots.count
    return total


def write_positions(slots: Slots, out: Tensor) -> int:
    """Stored slots to int32, (batch or 1, heads or 1, count), -1 where empty; how many."""
    stored = slots.stored
    assert stored is not None
    stored, rows = stored.contiguous(), stored.shape[:2].numel()
    if slots.gaps is not None:
        queries.positions_of_gaps[(rows, triton.cdiv(slots.count, _BLOCK))](
            stored, out, slots.count, slots.start, BLOCK=_BLOCK
        )
    else:
        queries.positions_of_bits[(rows, triton.cdiv(8 * stored.shape[2], _BLOCK))](
            stored, out, slots.count, slots.start, stored.shape[2], BLOCK=_BLOCK
        )
    return rows * slots.count


def put(row: Tensor, at: tl.constexpr, x: Tensor, keep: list[Tensor]) -> Tensor:
    """Puts x's address into a line of a table."""
    keep.append(x)
    row[at.value] = x.data_ptr()
    return x
