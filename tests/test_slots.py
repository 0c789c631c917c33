"""Slots as properties against plain lists, in whichever of their three forms they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.accounting import storage_bytes
from nexusquant.slots import Slots

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@dataclass(frozen=True)
class Lists:
    """Slots stated plainly: one list of positions (-1 = empty) per batch row and head."""

    rows: list[list[list[int]]]

    @property
    def tensor(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.long)

    @property
    def last(self) -> int:
        return max((slot for heads in self.rows for row in heads for slot in row), default=-1)

    def append(self, other: Lists) -> Lists:
        heads = max(len(self.rows[0]), len(other.rows[0]))
        mine, theirs = (
            [row * (heads // len(row)) for row in lists.rows] for lists in (self, other)
        )
        return Lists(
            [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(mine, theirs, strict=True)]
        )

    def drop(self, count: int) -> Lists:
        return Lists([[row[count:] for row in heads] for heads in self.rows])

    def leading_before(self, slot: int) -> int:
        def leading(row: list[int]) -> int:
            return next((i for i, at in enumerate(row) if at >= slot), len(row))

        return min(leading(row) for heads in self.rows for row in heads)


@st.composite
def lists(draw: st.DrawFn, batch: int, heads: int, first: int, holes: bool) -> Lists:
    """Ascending positions from `first` on; empty entries at the end, or anywhere (`holes`)."""
    count = draw(st.integers(1, 20))
    if draw(st.booleans()) and heads == 1:  # one contiguous run, which needs no storage
        start = first + draw(st.integers(0, 3))
        return Lists([[list(range(start, start + count))]] * batch)
    near, far = [1, 1, 1, 2, 3, 7], [1, 2, 255, 256, 300, 32767, 32768, 100_000]
    gap = st.sampled_from(draw(st.sampled_from([near, near, far])))
    rows = []
    for _ in range(batch):
        row = []
        for _ in range(heads):
            filled = draw(st.integers(0, count))
            at, slots = first - 1, []
            for _ in range(filled):
                at += draw(gap)
                slots.append(at)
            for _ in range(count - filled):
                place = draw(st.integers(0, len(slots))) if holes else len(slots)
                slots.insert(place, -1)
            row.append(slots)
        rows.append(row)
    return Lists(rows)


def seen(slots: Slots, model: Lists) -> list[list[list[int]]]:
    """What `slots` says, in the shape of the model."""
    batch, heads = len(model.rows), len(model.rows[0])
    return slots.positions(CPU).expand(batch, heads, -1).tolist()


@settings(max_examples=250, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([1, 1, 2]), st.booleans())
def test_slots_behave_like_lists(data: st.DataObject, batch: int, heads: int, holes: bool) -> None:
    """Appending lists with empty entries at their end leaves those in the middle."""
    first = data.draw(st.integers(0, 40))
    model = data.draw(lists(batch, heads, first, holes))
    slots = Slots.of(model.tensor)
    assert seen(slots, model) == model.rows
    for step in data.draw(st.lists(st.sampled_from(["append", "drop", "map"]), max_size=4)):
        if step == "append":
            wide = data.draw(st.sampled_from([1, heads]))
            more = data.draw(lists(batch, wide, model.last + 1, holes))
            slots, model = slots.append(Slots.of(more.tensor), batch), model.append(more)
        elif step == "drop":
            count = data.draw(st.integers(0, slots.count))
            slots, model = slots.drop(count), model.drop(count)
        else:
            order = data.draw(st.permutations(range(batch)))
            slots = slots.map(lambda t, order=order: t[list(order)] if len(t) > 1 else t)
            model = Lists([model.rows[i] for i in order])
        assert slots.count == len(model.rows[0][0])
        assert slots.gaps is None or slots.bitmap is None
        if slots.count:
            assert seen(slots, model) == model.rows
    for slot in (0, first, first + 1, model.last, model.last + 1, 300, 40_000):
        assert slots.leading_before(slot) == model.leading_before(slot)


def test_a_contiguous_run_stores_nothing() -> None:
    slots = Slots.of(torch.arange(5, 1005).expand(2, 3, 1000))
    assert slots == Slots(5, 1000)
    longer = slots.append(Slots.of(torch.arange(1005, 1010).view(1, 1, -1)), 2).drop(10)
    assert longer == Slots(15, 995)
    assert storage_bytes(longer) == 0


@pytest.mark.parametrize(
    ("gap", "width"), [(26, 1), (255, 1), (256, 2), (32767, 2), (32768, 4), (10**6, 4)]
)
def test_gaps_take_the_narrowest_type(gap: int, width: int) -> None:
    index = torch.tensor([[[3, 4, 4 + gap, 5 + gap]]])
    slots = Slots.of(index)
    assert torch.equal(slots.positions(CPU), index)
    assert storage_bytes(slots) == 4 * width
    shifted = Slots.of(torch.tensor([[[0, 2]]])).append(Slots.of(index + gap), 1)
    assert shifted.positions(CPU).tolist() == [[[0, 2, *(index + gap).flatten().tolist()]]]


def test_no_entries_and_only_empty_entries() -> None:
    none = Slots.of(torch.zeros(2, 1, 0, dtype=torch.long))
    assert none.positions(CPU).shape[-1] == 0
    some = Slots.of(torch.tensor([[[4, 6]]]))
    assert none.append(some, 2) is some
    assert some.append(none, 2) is some
    empty = Slots.of(torch.full((2, 1, 3), -1))
    assert empty.positions(CPU).tolist() == [[[-1, -1, -1]]] * 2
    assert empty.leading_before(0) == 3
    both = empty.append(Slots.of(torch.tensor([[[0, 1]], [[-1, 7]]])), 2)
    assert both.positions(CPU).tolist() == [[[-1, -1, -1, 0, 1]], [[-1, -1, -1, -1, 7]]]


def bitmap_reference(rows: list[list[list[int]]]) -> list[list[list[int]]]:
    """One bit per slot from the first one on, bit i of byte j for slot 8 j + i."""
    slots = [slot for heads in rows for row in heads for slot in row if slot >= 0]
    start, width = min(slots), (max(slots) - min(slots)) // 8 + 1
    return [
        [
            [sum(1 << i for i in range(8) if start + 8 * j + i in row) for j in range(width)]
            for row in heads
        ]
        for heads in rows
    ]


def drawn(kept: int, span: int, batch: int = 2, heads: int = 3) -> Tensor:
    """`kept` of `span` slots from 50 on, another choice per row and head; both ends are in."""
    chosen = [
        torch.cat([torch.tensor([0, span - 1]), torch.randperm(span - 2)[: kept - 2] + 1])
        for _ in range(batch * heads)
    ]
    return 50 + torch.stack(chosen).sort().values.view(batch, heads, kept)


def test_dense_choices_take_one_bit_per_slot() -> None:
    index = drawn(30, 61)
    index[1, 2, 25:] = index[0, 1, 29:] = -1
    slots = Slots.of(index)
    assert slots.stored is slots.bitmap
    assert slots.bitmap is not None
    assert slots.bitmap.dtype == torch.uint8
    assert slots.bitmap.tolist() == bitmap_reference(index.tolist())
    assert storage_bytes(slots) == 2 * 3 * 8
    assert torch.equal(slots.positions(CPU), index)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(0, 400), st.integers(0, 2**31))
def test_the_smaller_form_is_chosen(kept: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    span = kept + more
    index = drawn(kept, span)
    slots = Slots.of(index)
    assert torch.equal(slots.positions(CPU).expand_as(index), index)
    largest = int(index.diff(dim=-1).max())
    gaps = kept if largest < 256 else 2 * kept
    expected = 0 if more == 0 else min(gaps, (span + 7) // 8)
    assert storage_bytes(slots) == 6 * expected


def test_a_bitmap_has_no_place_for_holes() -> None:
    index = torch.tensor([[[3, -1, 4, 6, 7, 9, 10, 11, 12, -1]]])
    slots = Slots.of(index)
    assert slots.stored is slots.gaps
    assert torch.equal(slots.positions(CPU), index)
    trailing = Slots.of(torch.tensor([[[3, 4, 6, 7, 9, 10, 11, 12, -1, -1]]]))
    assert trailing.stored is trailing.bitmap
    joined = trailing.append(Slots(13, 2), 1)
    assert joined.stored is joined.gaps
    assert joined.positions(CPU).tolist() == [[[3, 4, 6, 7, 9, 10, 11, 12, -1, -1, 13, 14]]]
    assert joined.drop(10) == Slots.of(torch.tensor([[[13, 14]]]))


def test_rows_of_a_bitmap_are_picked_and_repeated() -> None:
    index = drawn(30, 61, batch=3)
    slots = Slots.of(index)
    pick = torch.tensor([2, 0, 0, 1])
    assert slots.bitmap is not None
    assert torch.equal(slots.map(lambda t: t[pick]).positions(CPU), index[pick])
    alone = Slots.of(index[:1]).map(lambda t: t.repeat_interleave(2, 0))
    assert torch.equal(alone.positions(CPU), index[:1].expand(2, -1, -1))


def test_leading_before_counts_over_a_bitmap() -> None:
    index = drawn(30, 61)
    slots = Slots.of(index)
    assert slots.bitmap is not None
    for slot in range(45, 115):
        row_counts = (index < slot).sum(-1)
        assert slots.leading_before(slot) == int(row_counts.min())
