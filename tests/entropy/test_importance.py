"""Which tokens get finer steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexusquant.entropy.importance import COARSER, FINER, FLOOR, POWER, UNIT, extra_steps
from nexusquant.entropy.profile import OCTAVE, QueryMoments
from tests.entropy.cases import HEADS, KEY, QUERIES, VALUE, page, queries

TOKENS = 60
SCALE = KEY**-0.5


def still(mean: Tensor) -> QueryMoments:
    """Queries that are always the same."""
    return QueryMoments(mean, torch.zeros(QUERIES, KEY, KEY, dtype=torch.bfloat16))


def blank() -> tuple[Tensor, Tensor]:
    """Keys that nobody prefers, values of size 1."""
    values = torch.zeros(HEADS, TOKENS, VALUE)
    values[..., 0] = 1
    return torch.zeros(HEADS, TOKENS, KEY), values


def test_equal_tokens_have_equal_steps() -> None:
    extra = extra_steps(*blank(), queries(), None, SCALE)
    assert extra.dtype == torch.int16
    assert extra.tolist() == [0] * TOKENS


def test_by_the_formula() -> None:
    (keys, values), moments = page(TOKENS), queries()
    weight = torch.zeros(TOKENS, dtype=torch.float64)
    for head in range(HEADS):
        k, size = keys[head].double(), values[head].double().norm(dim=-1)
        attention = torch.zeros(TOKENS, dtype=torch.float64)
        for q in (2 * head, 2 * head + 1):
            mean, spread = moments.mean[q].double(), moments.covariance[q].double()
            logits = SCALE * k @ mean + SCALE**2 / 2 * torch.einsum("ti,ij,tj->t", k, spread, k)
            attention += logits.softmax(0) / 2
        score = (attention * TOKENS + FLOOR) * size
        weight += score / score.mean()
    level = weight.log2()
    exact = -POWER * OCTAVE / UNIT * (level - level.mean())
    found = extra_steps(keys, values, moments, None, SCALE) / UNIT
    assert ((found - exact.clamp(FINER, COARSER)).abs() <= 0.501).all()
    assert len(found.unique()) > 3


def test_tokens_that_queries_look_at_get_finer_steps() -> None:
    keys, values = blank()
    mean = torch.zeros(QUERIES, KEY)
    mean[:, 2] = 4
    keys[:, 17, 2] = 6
    extra = extra_steps(keys, values, still(mean), None, SCALE)
    assert int(extra.argmin()) == 17
    assert extra[17] < extra.float().median()
    keys[:, 17, 2] = -6
    away = extra_steps(keys, values, still(mean), None, SCALE)
    assert away[17] >= away.float().median()


def test_what_queries_vary_along_counts() -> None:
    keys, values = blank()
    keys[:, 9, 5] = 8
    moments = still(torch.zeros(QUERIES, KEY))
    assert extra_steps(keys, values, moments, None, SCALE).unique().tolist() == [0]
    moments.covariance[:, 5, 5] = 2
    assert int(extra_steps(keys, values, moments, None, SCALE).argmin()) == 9


def test_queries_are_turned_to_the_positions_to_come() -> None:
    keys, values = blank()
    mean = torch.zeros(QUERIES, KEY)
    mean[:, 0] = 4
    keys[:, 3, 1] = 6
    turn = torch.zeros(KEY, KEY)
    turn[1, 0], turn[0, 1] = 1, -1
    assert extra_steps(keys, values, still(mean), None, SCALE)[3] == 0
    assert int(extra_steps(keys, values, still(mean), turn, SCALE).argmin()) == 3


def test_groups_of_queries_belong_to_their_head() -> None:
    keys, values = blank()
    keys[0, 3, 0] = keys[1, 40, 0] = 8
    mean = torch.zeros(QUERIES, KEY)
    mean[2:, 0] = 4  # the second head's
    extra = extra_steps(keys, values, still(mean), None, SCALE)
    assert int(extra.argmin()) == 40
    assert extra[3] >= 0


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_unit_of_values_is_nothing(factor: float) -> None:
    keys, values = page(TOKENS)
    extra = extra_steps(keys, values, queries(), None, SCALE)
    assert torch.equal(extra_steps(keys, factor * values, queries(), None, SCALE), extra)
    values[1] *= factor  # nor of those of one head
    assert torch.equal(extra_steps(keys, values, queries(), None, SCALE), extra)


def test_larger_values_get_finer_steps() -> None:
    keys, values = blank()
    values[:, 30] *= 4
    extra = extra_steps(keys, values, queries(), None, SCALE)
    assert int(extra.argmin()) == 30


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_steps_are_bounded(scale: float) -> None:
    keys, values = page(TOKENS)
    values[:, 5] *= 1e6
    values[:, 6] = 0
    extra = extra_steps(scale * keys, values, queries(), None, SCALE)
    assert extra.min() >= FINER * UNIT
    assert extra.max() == COARSER * UNIT
    assert (extra % UNIT == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("side", [0, 1])
def test_steps_are_numbers_whatever_vectors_are(value: float, side: int) -> None:
    x = page(TOKENS)
    x[side][0, 7, 3] = value
    extra = extra_steps(*x, queries(), None, SCALE)
    assert ((extra >= FINER * UNIT) & (extra <= COARSER * UNIT)).all()
    assert (extra % UNIT == 0).all()


def test_zero_values_and_no_tokens_have_steps() -> None:
    keys, values = page(TOKENS)
    assert extra_steps(keys, 0 * values, queries(), None, SCALE).tolist() == [0] * TOKENS
    none = extra_steps(keys[:, :0], values[:, :0], queries(), None, SCALE)
    assert none.shape == (0,)
    assert none.dtype == torch.int16
