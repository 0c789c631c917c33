"""Slots as properties against plain lists, and the stored tokens around them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.accounting import storage_bytes
from nexusquant.allocation import uniform_layout
from nexusquant.quantizer import Quantizer
from nexusquant.tokens import CodedTokens, ExactTokens, Slots, gather_tokens

CPU = torch.device("cpu")


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
    count = draw(st.integers(1, 6))
    if draw(st.booleans()) and heads == 1:  # one contiguous run, which needs no storage
        start = first + draw(st.integers(0, 3))
        return Lists([[list(range(start, start + count))]] * batch)
    gap = st.sampled_from([1, 1, 1, 2, 7, 255, 256, 300, 32767, 32768, 100_000])
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


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([1, 1, 2]), st.booleans())
def test_slots_behave_like_lists(data: st.DataObject, batch: int, heads: int, holes: bool) -> None:
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
    ("gap", "width"), [(2, 1), (255, 1), (256, 2), (32767, 2), (32768, 4), (10**6, 4)]
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


# -- stored tokens


def test_gather_tokens_per_head_and_shared() -> None:
    x = torch.randn(2, 3, 7, 4)
    per_head = torch.randint(0, 7, (2, 3, 5))
    per_head[0, 1, 3:] = -1
    got = gather_tokens(x, per_head)
    shared = gather_tokens(x, per_head[:, :1])
    for b in range(2):
        for h in range(3):
            for n in range(5):
                at = int(per_head[b, h, n].clamp(min=0))
                assert torch.equal(got[b, h, n], x[b, h, at])
                assert torch.equal(shared[b, h, n], x[b, h, int(per_head[b, 0, n].clamp(min=0))])


def exact(first: int, count: int, heads: int = 2) -> ExactTokens:
    keys, values = torch.randn(2, heads, count, 8), torch.randn(2, heads, count, 16)
    index = torch.arange(count).view(1, 1, -1).expand(2, 1, -1)
    return ExactTokens.select(keys, values, index, first, torch.float32)


def test_select_copies_tokens_and_zeroes_empty_entries() -> None:
    keys, values = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 16)
    keys[1, :, 0] = values[1, :, 0] = torch.nan  # padding: what an empty entry would read
    index = torch.tensor([[[1, 3, 5]], [[2, -1, -1]]])
    part = ExactTokens.select(keys, values, index, 100, torch.float16)
    assert part.kv_heads == 2
    assert part.keys.dtype == part.values.dtype == torch.float16
    assert torch.equal(part.keys[0], keys[0, :, [1, 3, 5]].half())
    assert torch.equal(part.values[1, :, 0], values[1, :, 2].half())
    assert not part.keys[1, :, 1:].any()
    assert not part.values[1, :, 1:].any()
    assert part.slots.positions(CPU).tolist() == [[[101, 103, 105]], [[102, -1, -1]]]
    assert storage_bytes(part.keys) == part.keys.numel() * 2


def test_what_overflows_the_dtype_keeps_its_own() -> None:
    keys = torch.full((1, 1, 2, 8), 1e5)
    index = torch.arange(2).view(1, 1, 2)
    part = ExactTokens.select(keys, keys / 10, index, 0, torch.float16)
    assert (part.keys.dtype, part.values.dtype) == (torch.float32, torch.float16)
    assert torch.equal(part.keys, keys)


def test_exact_tokens_append_drop_and_map() -> None:
    a, b = exact(0, 3), exact(10, 2)
    both = a.append(b)
    assert torch.equal(both.keys, torch.cat([a.keys, b.keys], 2))
    assert torch.equal(both.values, torch.cat([a.values, b.values], 2))
    assert both.slots.positions(CPU)[0, 0].tolist() == [0, 1, 2, 10, 11]
    rest = both.drop(4)
    assert torch.equal(rest.values, b.values[:, :, 1:])
    assert rest.slots.positions(CPU).flatten().unique().tolist() == [11]
    assert storage_bytes(rest) < storage_bytes(both) / 2, "dropped tokens are really gone"
    turned = both.map(lambda t: t.flip(0))
    assert torch.equal(turned.keys, both.keys.flip(0))


def coded(x: Tensor, first: int, mean: Tensor) -> CodedTokens:
    q = Quantizer(uniform_layout(x.shape[1], x.shape[-1], 3))
    slots = Slots.of(first + torch.arange(x.shape[2]).view(1, 1, -1).expand(len(x), 1, -1))
    codes = q.encode(x, mean), q.encode(-x, -mean)
    return CodedTokens(*codes, mean, -mean, slots, q, q)


def test_coded_tokens_append_drop_and_map() -> None:
    x, mean = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 1, 16).half()
    whole = coded(x, 5, mean)
    assert (whole.kv_heads, whole.device) == (2, CPU)
    both = coded(x[:, :, :30], 5, mean).append(coded(x[:, :, 30:], 35, mean))
    assert torch.equal(both.keys.rows, whole.keys.rows)
    assert torch.equal(both.values.gains, whole.values.gains)
    assert both.slots == whole.slots == Slots(5, 40)
    rest = both.drop(35)
    assert torch.equal(rest.values.rows, whole.values.rows[:, :, 35:])
    assert rest.slots == Slots(40, 5)
    assert storage_bytes(rest) < storage_bytes(both) / 3
    turned = whole.map(lambda t: t.flip(0))
    decoded = [p.key_quantizer.decode(p.keys, p.key_mean) for p in (turned, whole)]
    assert torch.equal(decoded[0], decoded[1].flip(0))
    decoded = [p.value_quantizer.decode(p.values, p.value_mean) for p in (turned, whole)]
    assert torch.equal(decoded[0], decoded[1].flip(0))
