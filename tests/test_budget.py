"""The budget rule as properties, and against a row-by-row statement of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.budget import Selection, select_tokens, split_tiers
from nexusquant.errors import ConfigError


@dataclass(frozen=True)
class Case:
    scores: Tensor
    valid: Tensor | None
    evict_ratio: float
    sinks: int
    recent: int
    per_head: bool

    def select(self) -> Selection:
        batch, kv_heads, tokens = self.scores.shape
        return select_tokens(
            self.scores,
            batch=batch,
            kv_heads=kv_heads,
            tokens=tokens,
            valid=self.valid,
            evict_ratio=self.evict_ratio,
            sinks=self.sinks,
            recent=self.recent,
            per_head=self.per_head,
            device="cpu",
        )

    def valid_indices(self, b: int) -> list[int]:
        if self.valid is None:
            return list(range(self.scores.shape[2]))
        return self.valid[b].nonzero().flatten().tolist()

    def total(self, b: int) -> int:
        n = len(self.valid_indices(b))
        return max(round((1 - self.evict_ratio) * n), min(n, self.sinks + self.recent))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, heads, tokens = (draw(st.integers(1, n)) for n in (3, 3, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct values, so that ties are common.
    levels = draw(st.sampled_from([2, 5, 1000]))
    scores = torch.randint(levels, (batch, heads, tokens), generator=generator) / levels - 0.5
    kind = draw(st.sampled_from(["none", "left", "any"]))
    valid = None
    if kind == "left":
        pads = torch.randint(tokens + 1, (batch, 1), generator=generator)
        valid = torch.arange(tokens) >= pads
    elif kind == "any":
        valid = torch.rand(batch, tokens, generator=generator) < 0.7
    if valid is not None:
        # Padding carries the best scores, and NaN: neither may matter.
        scores = scores.masked_fill(~valid[:, None], draw(st.sampled_from([1e9, float("nan")])))
    return Case(
        scores=scores,
        valid=valid,
        evict_ratio=draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.8, 0.99])),
        sinks=draw(st.integers(0, 6)),
        recent=draw(st.integers(0, 12)),
        per_head=draw(st.booleans()),
    )


def row(packed: Tensor) -> list[int]:
    """The indices of one packed row, after checking its form."""
    found = [i for i in packed.tolist() if i >= 0]
    assert packed.tolist() == found + [-1] * (len(packed) - len(found))
    assert found == sorted(set(found))
    return found


@settings(max_examples=300, deadline=None)
@given(cases())
def test_rule(case: Case) -> None:
    """Row by row, head by head, in plain Python."""
    batch, kv_heads, _ = case.scores.shape
    selection = case.select()
    heads = kv_heads if case.per_head and case.evict_ratio > 0 else 1
    assert selection.sinks.dtype == selection.kept.dtype == torch.int64
    assert selection.sinks.shape[0] == batch
    assert selection.kept.shape[:2] == (batch, heads)
    scores = case.scores if heads == kv_heads else case.scores.mean(1, keepdim=True)

    widths = {"sinks": 0, "kept": 0}
    for b in range(batch):
        valid = case.valid_indices(b)
        sinks = valid[: case.sinks]
        assert row(selection.sinks[b]) == sinks
        rest = valid[case.sinks :]
        recent = rest[len(rest) - min(case.recent, len(rest)) :]
        middle = rest[: len(rest) - len(recent)]
        budget = case.total(b) - len(sinks) - len(recent)
        for h in range(heads):
            row_scores = scores[b, h].tolist()
            ranked = sorted(middle, key=row_scores.__getitem__, reverse=True)  # stable
            kept = row(selection.kept[b, h])
            assert kept == sorted(ranked[:budget] + recent)
            assert len(sinks) + len(kept) == case.total(b)
            widths["kept"] = max(widths["kept"], len(kept))
        widths["sinks"] = max(widths["sinks"], len(sinks))
    assert selection.sinks.shape[1] == widths["sinks"]
    assert selection.kept.shape[2] == widths["kept"]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_rows_do_not_see_each_other(case: Case) -> None:
    together = case.select()
    for b in range(case.scores.shape[0]):
        alone = Case(
            case.scores[b : b + 1],
            None if case.valid is None else case.valid[b : b + 1],
            case.evict_ratio,
            case.sinks,
            case.recent,
            case.per_head,
        ).select()
        assert row(together.sinks[b]) == row(alone.sinks[0])
        for h in range(together.kept.shape[1]):
            assert row(together.kept[b, h]) == row(alone.kept[0, h])


def select(scores: Tensor | None = None, **changes: object) -> Selection:
    arguments: dict[str, object] = {
        "batch": 2,
        "kv_heads": 3,
        "tokens": 20,
        "valid": None,
        "evict_ratio": 0.5,
        "sinks": 2,
        "recent": 3,
        "per_head": True,
        "device": "cpu",
    }
    return select_tokens(scores, **(arguments | changes))


def test_high_scores_stay() -> None:
    scores = torch.zeros(2, 3, 20)
    scores[0, 1, 7] = scores[1, 2, 9] = 1.0
    selection = select(scores)
    assert selection.sinks.tolist() == [[0, 1], [0, 1]]
    ties = [2, 3, 4, 5, 6, 17, 18, 19]
    assert selection.kept[0, 0].tolist() == ties
    assert selection.kept[0, 1].tolist() == [2, 3, 4, 5, 7, 17, 18, 19]
    assert selection.kept[1, 2].tolist() == [2, 3, 4, 5, 9, 17, 18, 19]
    shared = select(scores, per_head=False)
    assert shared.kept[:, 0].tolist() == [[2, 3, 4, 5, 7, 17, 18, 19], [2, 3, 4, 5, 9, 17, 18, 19]]


def test_without_eviction_no_scores_are_needed() -> None:
    selection = select(evict_ratio=0.0)
    assert selection.sinks.tolist() == [[0, 1]] * 2
    assert selection.kept.tolist() == [[list(range(2, 20))]] * 2
    valid = torch.arange(20) >= torch.tensor([[0], [19]])
    selection = select(evict_ratio=0.0, valid=valid)
    assert selection.sinks.tolist() == [[0, 1], [19, -1]]
    assert selection.kept[0, 0].tolist() == list(range(2, 20))
    assert selection.kept[1, 0].tolist() == [-1] * 18


@pytest.mark.parametrize("evict_ratio", [0.0, 0.5])
def test_nothing_but_padding_and_nothing_at_all(evict_ratio: float) -> None:
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    selection = select(torch.zeros(2, 3, 20), valid=nothing, evict_ratio=evict_ratio)
    assert (selection.sinks.shape[1], selection.kept.shape[2]) == (0, 0)
    selection = select(torch.zeros(2, 3, 0), tokens=0, evict_ratio=evict_ratio)
    assert (selection.sinks.shape[1], selection.kept.shape[2]) == (0, 0)


def test_indices_own_no_more_memory_than_they_show() -> None:
    selection = select(torch.zeros(2, 3, 20))
    for tensor in selection:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        (None, {}, "needs scores"),
        (torch.zeros(2, 3, 20), {"valid": torch.ones(2, 19, dtype=torch.bool)}, "valid"),
        (torch.zeros(2, 3, 20), {"valid": torch.ones(2, 20)}, "valid"),
        (torch.zeros(2, 3, 20), {"evict_ratio": 1.0}, "evict_ratio"),
        (torch.zeros(2, 3, 20), {"evict_ratio": -0.1}, "evict_ratio"),
        (torch.zeros(2, 3, 20), {"evict_ratio": float("nan")}, "evict_ratio"),
        (torch.zeros(2, 3, 20), {"sinks": -1}, "sinks"),
        (torch.zeros(2, 3, 20), {"recent": -1}, "recent"),
    ],
)
def test_bad_arguments(scores: Tensor | None, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(scores, **changes)


# -- tiers


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tiers_are_the_ranks_of_a_plain_sort(data: st.DataObject) -> None:
    batch, heads, tokens = (data.draw(st.integers(1, n)) for n in (3, 3, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few values make ties
    scores = torch.randint(levels, (batch, heads, tokens), generator=generator) / levels - 0.5
    per_head = data.draw(st.booleans())
    width = heads if per_head else 1
    chosen = torch.rand(batch, width, tokens, generator=generator) < data.draw(st.floats(0, 1))
    kept = [[row.nonzero().flatten().tolist() for row in rows] for rows in chosen]
    longest = max(len(row) for rows in kept for row in rows)
    padded = [[row + [-1] * (longest - len(row)) for row in rows] for rows in kept]
    weights = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shares = [weight / sum(weights) for weight in weights]
    index = torch.tensor(padded).view(batch, width, longest)
    tiers = split_tiers(scores, index, shares)

    assert len(tiers) == len(shares)
    own = scores if per_head else scores.mean(1, keepdim=True)
    widest = [0] * len(shares)
    for b in range(batch):
        for h in range(width):
            of = own[b, h].tolist()
            order = sorted(range(len(kept[b][h])), key=lambda i: -of[kept[b][h][i]])
            begin = 0
            for i, tier in enumerate(tiers):
                assert tier.dtype == torch.int64
                assert tier.shape[:2] == (batch, width)
                entries = row(tier[b, h])
                end = begin + len(entries)
                assert abs(end - sum(shares[: i + 1]) * len(order)) <= 0.5001
                assert entries == sorted(order[begin:end])
                widest[i], begin = max(widest[i], len(entries)), end
            assert begin == len(order), "every token is in one tier"
    assert [tier.shape[2] for tier in tiers] == widest


def test_tiers_of_a_known_row() -> None:
    scores = torch.tensor([[[0.1, 9.0, 0.3, 7.0, 7.0, 0.2], [6.0, 1.0, 2.0, 3.0, 4.0, 5.0]]])
    kept = torch.tensor([[[1, 2, 3, 4], [0, 5, -1, -1]]])
    high, low = split_tiers(scores, kept, (0.5, 0.5))
    assert high.tolist() == [[[0, 2], [0, -1]]]  # entries of kept: tokens 1 and 3, token 0
    assert low.tolist() == [[[1, 3], [1, -1]]]
    together = split_tiers(scores, kept[:, :1], (0.25, 0.25, 0.5))
    assert [tier.tolist() for tier in together] == [[[[3]]], [[[0]]], [[[1, 2]]]]


def test_one_tier_is_everything_and_nothing_stays_nothing() -> None:
    kept = torch.tensor([[[0, 3, 4], [2, -1, -1]]])
    (only,) = split_tiers(torch.zeros(1, 2, 5), kept, (1.0,))
    assert only.tolist() == [[[0, 1, 2], [0, -1, -1]]]
    for nothing in (kept[..., :0], torch.full((1, 2, 3), -1)):
        tiers = split_tiers(torch.zeros(1, 2, 5), nothing, (0.2, 0.3, 0.5))
        assert [tier.shape for tier in tiers] == [(1, 2, 0)] * 3


def test_empty_entries_do_not_look_at_scores() -> None:
    """They read token 0, whose score must not count again, be it the best or NaN."""
    kept = torch.tensor([[[1, 2, -1, -1]]])
    for first in (100.0, float("nan")):
        scores = torch.tensor([[[first, 1.0, 2.0]]])
        high, low = split_tiers(scores, kept, (0.5, 0.5))
        assert (high.tolist(), low.tolist()) == ([[[1]]], [[[0]]])
