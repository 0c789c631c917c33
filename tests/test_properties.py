"""Properties that no other file states: positions, parts of uneven heads, quotas of a limit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.budget import split_heads
from nexusquant.math.rope import RopeTable, capture, tiled
from nexusquant.retention import _quotas
from nexusquant.slots import Slots

CPU = torch.device("cpu")
FREQUENCIES = 1.0 / 10_000 ** (torch.arange(4) / 4)


def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's rotation, by halves."""

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    return turn(q), turn(k)


def rows_at(positions: Tensor) -> tuple[Tensor, Tensor]:
    angle = (positions[..., None].float() * FREQUENCIES)[..., tiled("halves", 8)]
    return angle.cos(), angle.sin()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.booleans())
def test_a_table_knows_the_position_of_every_slot(
    data: st.DataObject, batch: int, known: bool
) -> None:
    """Whatever positions rows are given, extended, taken back, rearranged; or copied rows."""
    table = RopeTable(apply)
    model: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(data.draw(st.integers(1, 5))):
        step = data.draw(st.sampled_from(["extend", "extend", "truncate", "map"]))
        length = len(model[0])
        if step == "extend" or not length:
            new = data.draw(st.integers(1, 6))
            past = data.draw(st.integers(0, length))  # from here on anew
            gaps = st.lists(st.integers(0, 300), min_size=new, max_size=new)
            starts = [data.draw(st.integers(0, 5000)) for _ in range(batch)]
            steps = [data.draw(gaps) for _ in range(batch)]
            given_rows = [
                [start + sum(gap[: i + 1]) for i in range(new)]
                for start, gap in zip(starts, steps, strict=True)
            ]
            positions = torch.tensor(given_rows)
            cos, sin = rows_at(positions)
            table.extend(past, capture(cos, sin, positions, [(FREQUENCIES, 1.0)] if known else []))
            model = [row[:past] + more for row, more in zip(model, given_rows, strict=True)]
        elif step == "truncate":
            length = data.draw(st.integers(1, length))
            table.truncate(length)
            model = [row[:length] for row in model]
        else:
            order = data.draw(st.permutations(range(batch)))
            table.map(lambda t, order=order: t[list(order)], batch)
            model = [model[i] for i in order]
        assert table.length == len(model[0])
        expected = rows_at(torch.tensor(model))
        for found, row in zip(table.rows(1), expected, strict=True):
            torch.testing.assert_close(found.expand_as(row), row, rtol=0, atol=2e-5)
        if known:
            expected = rows_at(torch.tensor(model) // 32 * 32)
            for found, row in zip(table.rows(32), expected, strict=True):
                torch.testing.assert_close(found.expand_as(row), row, rtol=0, atol=2e-5)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_parts_of_uneven_heads_hold_every_entry_once(
    data: st.DataObject, batch: int, heads: int
) -> None:
    counts = [[data.draw(st.integers(0, 60)) for _ in range(heads)] for _ in range(batch)]
    width = max(max(row) for row in counts)
    rows = [[list(range(n)) + [-1] * (width - n) for n in row] for row in counts]
    entries = torch.tensor(rows).view(batch, heads, width)
    parts = split_heads(entries)
    assert parts[0][0] is None
    found: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(batch)]
    for index, (members, part) in enumerate(parts):
        own = range(heads) if members is None else members
        assert part.shape[:2] == (batch, len(own))
        assert (members is None) == (index == 0)
        for b in range(batch):
            for at, head in enumerate(own):
                found[b][head] += [i for i in part[b, at].tolist() if i >= 0]
    assert found == [[list(range(n)) for n in row] for row in counts]


@dataclass(frozen=True)
class Held:
    """What `_quotas` reads of a part."""

    slots: Slots
    kv_heads: int
    device: torch.device


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 400), st.integers(0, 60))
def test_quotas_never_exceed_the_room_unless_recent_tokens_do(
    data: st.DataObject, room: int, recent_from: int
) -> None:
    parts, recent = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        kept = sorted(data.draw(st.sets(st.integers(0, 59), min_size=1, max_size=40)))
        parts.append(Held(Slots.of(torch.tensor([[kept]])), data.draw(st.integers(1, 3)), CPU))
        recent.append(sum(slot >= recent_from for slot in kept))
    held = [part.slots.count for part in parts]
    whole = sum(count * part.kv_heads for count, part in zip(held, parts, strict=True))
    room = min(room, whole - 1)  # else nobody asks
    asked = _quotas(parts, room, recent_from)  # of a small part maybe more than it holds
    quotas = [min(quota, count) for quota, count in zip(asked, held, strict=True)]
    assert all(a <= b <= c for a, b, c in zip(recent, quotas, held, strict=True))
    entries = sum(quota * part.kv_heads for quota, part in zip(quotas, parts, strict=True))
    sure = sum(count * part.kv_heads for count, part in zip(recent, parts, strict=True))
    assert entries <= max(room, sure)
    assert entries > room - sum(part.kv_heads for part in parts)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_missing_in_between_is_refused(batch: int) -> None:
    table = RopeTable(apply)
    positions = torch.arange(5).expand(batch, -1)
    table.extend(0, capture(*rows_at(positions), positions, [(FREQUENCIES, 1.0)]))
    with pytest.raises(ValueError, match="slots 5 to 6 were never recorded"):
        table.extend(7, capture(*rows_at(positions), positions, [(FREQUENCIES, 1.0)]))
