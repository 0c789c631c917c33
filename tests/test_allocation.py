"""Bit allocation: optimal among all allocations, on budget, deterministic; uniform costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.allocation import allocate, uniform_costs
from nexusquant.config import MAX_BITS
from nexusquant.errors import UnsupportedError
from nexusquant.math.e8 import BITS, DISTORTION

ONE = torch.ones(1)
costs = st.floats(-12, 12).map(math.exp)


def allocated(cost: Tensor, shares: Tensor, bits: float) -> Tensor:
    """For errors that are independent between tokens."""
    return allocate(torch.stack([cost, torch.zeros_like(cost)], -1), shares, bits)


def damage(rates: Tensor, cost: Tensor, shares: Tensor) -> Tensor:
    """What is left of every group's costs, (...,) for rates (..., tiers, groups)."""
    left = torch.tensor(DISTORTION, dtype=torch.float64)[rates]
    return (shares[:, None] * (cost[..., 0] * left + cost[..., 1] * left**2)).sum((-2, -1))


def spent(rates: Tensor, shares: Tensor) -> Tensor:
    return (rates * shares[:, None]).sum((-2, -1))


def every_allocation(tiers: int, groups: int) -> Tensor:
    rates = itertools.product(range(MAX_BITS + 1), repeat=tiers * groups)
    return torch.tensor(list(rates)).view(-1, tiers, groups)


EVERY = {shape: every_allocation(*shape) for shape in ((1, 1), (1, 3), (2, 2), (1, 4), (3, 1))}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    tiers, groups = draw(st.sampled_from(list(EVERY)))
    row = st.lists(st.tuples(costs, st.just(0.0) | costs), min_size=groups, max_size=groups)
    cost = torch.tensor(draw(st.lists(row, min_size=tiers, max_size=tiers))).double()
    weights = draw(st.lists(st.integers(1, 9), min_size=tiers, max_size=tiers))
    shares = torch.tensor(weights).double() / sum(weights)
    return cost, shares, draw(st.floats(0, 8.5))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_nothing_better_costs_as_little(problem: tuple[Tensor, Tensor, float]) -> None:
    cost, shares, bits = problem
    rates = allocate(cost, shares, bits)
    assert (rates.dtype, rates.shape) == (torch.int64, cost.shape[:-1])
    paid, budget = float(spent(rates, shares)), bits * cost.shape[1]
    assert paid <= budget * (1 + 1e-6)
    assert paid > budget - float(shares.max()) or bool((rates == MAX_BITS).all())
    every = EVERY[tuple(cost.shape[:-1])]
    affordable = every[spent(every, shares) <= paid + 1e-9]
    best = damage(affordable, cost, shares).min()
    assert float(damage(rates, cost, shares)) <= float(best) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(costs, min_size=1, max_size=30), st.floats(0, 8), st.floats(0, 8))
def test_more_bits_never_take_any_away(cost: list[float], a: float, b: float) -> None:
    few, many = (allocated(torch.tensor([cost]), ONE, bits) for bits in sorted((a, b)))
    assert (few <= many).all()


def test_costlier_groups_get_at_least_as_many_bits() -> None:
    cost = torch.rand(1, 5, 16).exp().pow(8).sort(descending=True).values
    rates = allocated(cost, ONE, 2.3)
    assert rates.shape == (1, 5, 16)
    assert (rates.diff(dim=-1) <= 0).all()
    assert rates.unique().numel() >= 3
    assert abs(float(rates.double().mean()) - 2.3) <= 1 / rates.numel()


def test_a_factor_of_four_is_worth_about_one_bit() -> None:
    """At high rates; what the tiers of `CompressionConfig` build on."""
    shares = torch.tensor([0.25, 0.75])
    cost = torch.tensor([[4.0], [1.0]]) * torch.logspace(0, 1, 200)
    mean = allocated(cost, shares, 4.0).double().mean(-1)
    assert float(mean @ shares.double()) == pytest.approx(4.0, abs=0.01)
    assert float(mean[0] - mean[1]) == pytest.approx(1.0, abs=0.1)


def test_what_adds_up_over_tokens_gets_its_first_bit_earlier() -> None:
    """And no more than that: shrinkage is the square of the distortion."""
    cost = torch.tensor([[[1.0, 0.0], [0.9, 3.0]]])
    assert [allocate(cost, ONE, bits).tolist() for bits in (0.5, 1, 1.5, 4)] == [
        [[0, 1]], [[1, 1]], [[1, 2]], [[4, 4]],
    ]  # fmt: skip


def test_shares_are_prices() -> None:
    """The cost of a group is per token: a tier of few tokens gets its bits for less."""
    cost, shares = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0.1, 0.9])
    assert allocated(cost, shares, 1.0).tolist() == [[1, 1], [1, 1]]
    # What is left of the budget, 0.2 of 2, pays for tier 0, which ties with tier 1 but comes first.
    assert allocated(cost, shares, 1.101).tolist() == [[2, 2], [1, 1]]
    # With 10 % of the tokens, four bits in tier 0 cost less than one in tier 1.
    cost *= torch.tensor([[1e6], [1.0]])
    assert allocated(cost, shares, 0.451).tolist() == [[5, 4], [0, 0]]


def test_ties_go_to_the_lower_index() -> None:
    for bits, expected in ((1.0, [1, 1, 1, 1]), (1.25, [2, 1, 1, 1]), (2.75, [3, 3, 3, 2])):
        assert allocated(torch.full((1, 4), 7.0), ONE, bits).tolist() == [expected]
    tiers = allocated(torch.ones(2, 2), torch.tensor([0.5, 0.5]), 1.25)
    assert tiers.tolist() == [[2, 1], [1, 1]]


def test_free_groups_come_last() -> None:
    cost = torch.tensor([[0.0, 1e-20, 0.0, 1e20]])
    assert allocated(cost, ONE, 4.0).tolist() == [[0, 8, 0, 8]]
    assert allocated(cost, ONE, 5.0).tolist() == [[2, 8, 2, 8]]
    assert allocated(torch.zeros(1, 3), ONE, 2).tolist() == [[2, 2, 2]]


def test_the_ends_of_the_scale() -> None:
    cost = torch.rand(2, 3)
    shares = torch.tensor([0.3, 0.7])
    assert not allocated(cost, shares, 0.0).any()
    assert (allocated(cost, shares, MAX_BITS) == MAX_BITS).all()
    assert (allocated(cost, shares, 100.0) == MAX_BITS).all()
    assert max(BITS) == MAX_BITS


# -- uniform costs


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("dim", [8, 80, 128])
@pytest.mark.parametrize("eighths", [*range(1, 34), 45, 63, 64])
def test_uniform_rates_differ_by_one_at_most(heads: int, dim: int, eighths: int) -> None:
    bits, groups = eighths / 8, heads * dim // 8
    rates = allocate(uniform_costs(heads, dim)[None], ONE, bits)[0]
    assert rates.shape == (heads, dim // 8)
    assert int(rates.sum()) == math.floor(bits * groups)
    assert int(rates.max() - rates.min()) <= 1
    assert (rates.diff(dim=-1) <= 0).all(), "fractions go to the leading groups"
    assert int(rates.sum(-1).max() - rates.sum(-1).min()) <= 1


def test_head_dims_differ_between_sides_without_effect_on_whole_rates() -> None:
    cost = torch.cat([uniform_costs(2, dim).flatten(0, 1) for dim in (64, 256)])[None]
    for bits in BITS:
        assert (allocate(cost, ONE, bits) == bits).all()


@pytest.mark.parametrize("dim", [12, 4, 63])
def test_head_dims_without_whole_groups_are_refused(dim: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{dim} is not a multiple of 8"):
        uniform_costs(1, dim)
