"""Costs by rank against loops over pairs in float64, and what they are for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.frame import KeyFrame, QueryRope
from nexusquant.rank_costs import RANKS, later_queries, rank_costs
from nexusquant.scorers import ScoreInputs, get_scorer
from nexusquant.statistics import LayerStatistics
from tests.statistics_cases import Case, case, close


def expected(one: Case) -> tuple[Tensor, Tensor]:
    """Pair by pair; the classes are so large that every rank lies in one or two of them."""
    real, kv_heads = one.real, one.keys.shape[1]
    front, later = later_queries(len(real))
    group = one.queries.shape[1] // kv_heads
    missing = one.keys.shape[2] - one.queries.shape[2]
    row, frame = slice(one.row, one.row + 1), one.frame.of_row(one.row)
    known = [i - missing for i in real[:front] if i >= missing]
    scores = get_scorer("expected_and_observed").score(
        ScoreInputs(
            one.queries[row][:, :, known], one.keys[row][:, :, real[:front]],
            one.values[row][:, :, real[:front]], None, one.scaling, one.softcap, one.skip,
            QueryRope.of(frame, real[front - 1] + one.start, one.keys.shape[-1]),
        )
    )[0]  # fmt: skip
    damage = torch.zeros(2, kv_heads, front).double()
    recent, pairs = torch.zeros(2, kv_heads).double(), 0
    gram = torch.zeros(kv_heads, one.values.shape[-1], one.values.shape[-1]).double()
    for head in range(kv_heads * group):
        w = one.projection(head)
        gram[head // group] += w.mT @ w / group
    for head, at in itertools.product(range(kv_heads * group), later.tolist()):
        kv, q = head // group, one.at(one.queries, head, real[at])
        seen = real[: at + 1]
        logits = torch.stack([one.at(one.keys, kv, i) @ q * one.scaling for i in seen])
        if one.softcap is not None:
            logits = torch.tanh(logits / one.softcap) * one.softcap
        weights = logits.softmax(0)
        values = torch.stack([one.at(one.values, kv, i) for i in seen])
        output = weights @ values
        for place in range(one.skip, at + 1):
            apart = values[place] - output
            square = float(weights[place]) ** 2 * one.inverse_residual(real[at])
            both = torch.tensor([square * float(apart @ gram[kv] @ apart), square]).double()
            if place < front:
                damage[:, kv, place] += both / len(later)
            if 8 <= at - place < 128:
                recent[:, kv] += both
                pairs += head == 0
    order = scores[:, one.skip :].argsort(dim=-1, descending=True, stable=True)
    ordered = damage[:, :, one.skip :].gather(-1, order.expand(2, -1, -1))
    fine = ordered.repeat_interleave(RANKS, -1)  # so that classes are whole
    classes = fine.unflatten(-1, (RANKS, -1)).mean(-1)
    costs = torch.cat([classes, recent[..., None] / pairs], -1)
    return costs[0], costs[1]


CASES: dict[str, dict[str, Any]] = {
    "short": {},
    "grouped": {"tokens": 90, "group": 3, "kv_heads": 1},
    "pages": {"tokens": 60, "page": 32, "group": 2},
    "softcap": {"softcap": 0.5},
    "last queries": {"tokens": 60, "q_len": 40},
    "later chunk": {"start": 64},
    "norms": {"readers": 2},
    "many": {"tokens": 700, "kv_heads": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_every_pair(name: str) -> None:
    one = case(**CASES[name])
    found = one.statistics().rank_costs
    assert found is not None
    for got, wanted in zip(found, expected(one), strict=True):
        assert got.shape == (one.keys.shape[1], RANKS + 1)
        close(got, wanted)


def test_of_a_padded_row_the_tokens() -> None:
    valid = torch.arange(60) >= torch.tensor([[12], [3], [30]])
    one = case(60, batch=3, valid=valid)
    for x in (one.keys, one.values, one.queries):
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    found = one.statistics().rank_costs
    assert found is not None
    for got, wanted in zip(found, expected(one), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("more", [{"behind": True}, {"project": False, "residual": False}], ids=str)
def test_a_norm_behind_the_output_or_the_output_sets_the_unit(more: dict[str, Any]) -> None:
    one = case(**more)
    found = one.statistics()
    assert found.rank_costs is not None
    raw = expected(one)
    units = [float((x / y).median()) for x, y in zip(found.rank_costs, raw, strict=True)]
    assert units[0] == pytest.approx(units[1], rel=1e-3)
    for got, wanted in zip(found.rank_costs, raw, strict=True):
        close(got, wanted * units[0])


@pytest.mark.parametrize("settings", [{"tokens": 5}, {"tokens": 60, "q_len": 12}], ids=str)
def test_too_little_tells_nothing(settings: dict[str, Any]) -> None:
    assert case(**settings).statistics().rank_costs is None


def test_texts_that_tell_are_averaged() -> None:
    parts = [case().statistics() for _ in range(3)]
    parts[1] = replace(parts[1], rank_costs=None)
    mean = LayerStatistics.mean(parts).rank_costs
    assert mean is not None
    for i in (0, 1):
        pair = [part.rank_costs[i] for part in parts if part.rank_costs is not None]
        torch.testing.assert_close(mean[i], sum(pair) / 2)
    assert LayerStatistics.mean(parts[1:2]).rank_costs is None


def test_a_head_that_copies_costs_more_in_all_ranks_than_one_that_looks_next_to_itself() -> None:
    """Head 0 finds one token far back, each time another one; head 1 attends to itself."""
    tokens, dim = 400, 64
    keys = torch.nn.functional.normalize(torch.randn(2, tokens, dim), dim=-1)
    values = torch.randn(2, tokens, 16)
    queries = 60 * keys.clone()
    queries[0, 1:] = 60 * keys[0, torch.randint(0, 300, (tokens - 1,)).sort().values]
    at = torch.randperm(300)[:100]
    queries[0, 300:] = 60 * keys[0, at]
    found = rank_costs(
        keys, values, queries, torch.eye(16).expand(2, 16, 16), torch.ones(100),
        last_slot=tokens - 1, frame=KeyFrame(None, 0), sinks=4, scaling=1.0, softcap=None,
    )  # fmt: skip
    assert found is not None
    for costs in found:
        assert costs[0, :-1].mean() > 1000 * costs[1, :-1].mean()
