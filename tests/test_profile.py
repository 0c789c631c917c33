"""Profiles: what noise costs, shared weights, and layouts that spend every budget where it pays."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.allocation import allocate
from nexusquant.profile import (
    VALUE_SHARE,
    Budget,
    LayerProfile,
    Layouts,
    Profile,
    Shared,
    Side,
)
from nexusquant.rank_costs import RANKS

CPU = torch.device("cpu")
TIERS = (0.12, 0.34, 0.54)
PLAIN = Budget(2.0, 2.0, True, (1.0,), (1.0,))
TIERED = Budget(2.0, 2.0, True, TIERS, (16.0, 4.0, 1.0))


def side(heads: int, dim: int, weight: float = 1.0) -> Side:
    variance = torch.rand(heads, dim // 8).exp().pow(4).sort(descending=True).values
    forward = torch.randn(heads, dim, dim)
    coherence = 1 + torch.rand(heads, dim // 8).sort(descending=True).values
    return Side(
        forward, forward.inverse(), torch.randn(heads, dim), variance,
        weight * torch.rand(heads).exp().pow(5), coherence,
    )  # fmt: skip


def layer(key: float = 1.0, value: float = 1.0, dims: tuple[int, int] = (32, 32)) -> LayerProfile:
    return LayerProfile(side(2, dims[0], key), side(2, dims[1], value), 0.1 + torch.rand(1).item())


def profile(*layers: LayerProfile, complete: bool = True) -> Profile:
    # Not in order and with a gap: layers that are not compressed have no profile.
    places = [5, 0, 2, 9][: len(layers)]
    return Profile("abc", 32, "test", 600, dict(zip(places, layers, strict=True)), complete)


def spent(tiers: list[Layouts], shares: tuple[float, ...], side: int) -> float:
    """Bytes per token of keys (0) or values (1), averaged over the tiers."""
    return sum(s * pair[side].row_bytes for s, pair in zip(shares, tiers, strict=True))


def rates(tiers: list[Layouts], side: int) -> Tensor:
    """(tiers, heads, groups)."""
    return torch.tensor([pair[side].rates for pair in tiers])


# -- costs


def test_costs_without_ranks_head_by_head() -> None:
    """All heads weigh alike; their variances differ, and tiers are so many bits apart."""
    one = layer()
    shared = Shared(0.03, 0.4)
    for got, part, factor, mean, share in zip(
        one.costs(shared, TIERED), (one.key, one.value), (1.0, one.inverse_residual), (0.03, 0.4),
        (1.0, VALUE_SHARE), strict=True,
    ):  # fmt: skip
        assert got.shape == (3, 2, 4, 2)
        for tier, head, group in itertools.product(range(3), range(2), range(4)):
            expected = share * factor * mean * float(part.variance[head, group])
            expected *= TIERED.factors[tier]
            more = expected * (float(part.coherence[head, group]) - 1)
            assert got[tier, head, group].tolist() == pytest.approx([expected, more], rel=1e-4)


def test_costs_by_rank_head_by_head() -> None:
    """A tier costs what the ranks in it do, in the mean; what no rank tells counts for nothing."""
    by_rank = torch.rand(2, 2, RANKS + 1).exp().pow(6)  # of keys and of values
    one = replace(layer(), rank_costs=(by_rank[0], by_rank[1]))
    budget = replace(TIERED, shares=(0.125, 0.375, 0.5), kept=0.8)
    stops = (0, 4, 16, 32)  # of 40 ranks
    for got, part, ranks, share in zip(
        one.costs(Shared(7, 7), budget), (one.key, one.value), by_rank, (1.0, VALUE_SHARE),
        strict=True,
    ):  # fmt: skip
        for tier, head, group in itertools.product(range(3), range(2), range(4)):
            mean = float(ranks[head, stops[tier] : stops[tier + 1]].double().mean())
            expected = share * mean * float(part.variance[head, group])
            assert float(got[tier, head, group, 0]) == pytest.approx(expected, rel=1e-4)
    parts = replace(PLAIN, shares=(0.3, 0.7)).tier_costs(by_rank[0])
    torch.testing.assert_close(
        0.3 * parts[0] + 0.7 * parts[1], by_rank[0, :, :-1].double().mean(-1), rtol=1e-6, atol=0
    )
    recent = replace(PLAIN, recent=True).tier_costs(by_rank[0])
    assert torch.equal(recent, by_rank[0, None, :, -1].double())


def test_ranks_by_other_scores_tell_of_the_head_as_a_whole() -> None:
    by_rank = torch.rand(2, RANKS + 1)
    got = replace(TIERED, ranked=False, kept=0.5).tier_costs(by_rank)
    mean = (torch.tensor(TIERS)[:, None] * got).sum(0)
    torch.testing.assert_close(mean, by_rank[:, :-1].double().mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(got[0] / got[2], torch.full((2,), 16.0).double())


def test_heads_that_look_back_get_the_bits() -> None:
    """And among their tokens those of the ranks that they look at."""
    flat = torch.ones(2, RANKS + 1)
    flat[1] = 100
    steep = flat.clone()
    steep[:, :4] *= 100
    both = {}
    for name, ranks in (("flat", flat), ("steep", steep)):
        one = replace(layer(), rank_costs=(ranks, ranks))
        for part in (one.key, one.value):
            part.variance.fill_(1)
            part.coherence.fill_(1)
        found = profile(one).layouts(5, replace(TIERED, shares=(0.1, 0.4, 0.5)))
        both[name] = rates(found, 0).double().mean(-1)  # (tiers, heads)
    assert (both["flat"][:, 1] >= both["flat"][:, 0] + 2).all()
    assert (both["flat"].amax(0) - both["flat"].amin(0)).max() <= 1, "all ranks alike"
    assert (both["steep"][0] >= both["steep"][1] + 2).all()


def test_shared_weights_are_geometric_means_over_all_heads() -> None:
    layers = [layer(10.0**i, 0.1**i) for i in range(3)]
    shared = Shared.of(layers)
    keys = [float(w) for one in layers for w in one.key.weight]
    values = [float(w) / one.inverse_residual for one in layers for w in one.value.weight]
    assert shared.key == pytest.approx(math.prod(keys) ** (1 / 6), rel=1e-4)
    assert shared.value == pytest.approx(math.prod(values) ** (1 / 6), rel=1e-4)


def test_a_head_without_any_influence_breaks_nothing() -> None:
    one = layer()
    one.key.weight[0] = 0
    known = profile(one)
    strongest = float(one.key.weight.max())
    assert 1e-6 * strongest < Shared.of([one]).key < strongest
    cost = one.costs(Shared.of([one]), PLAIN)[0]
    assert (cost[..., 0] > 0).all()
    assert (
        spent(known.layouts(5, PLAIN), (1.0,), 0) + spent(known.layouts(5, PLAIN), (1.0,), 1) == 32
    )


# -- budgets


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    cuts = sorted(draw(st.lists(st.integers(1, 99), max_size=3, unique=True)))
    shares = tuple((b - a) / 100 for a, b in itertools.pairwise([0, *cuts, 100]))
    factors = tuple(4.0 ** (len(shares) - 1 - i) for i in range(len(shares)))
    bits = st.floats(0.3, 7)
    return Budget(draw(bits), draw(bits), draw(st.booleans()), shares, factors)


@settings(max_examples=60, deadline=None)
@given(budgets(), st.integers(1, 4))
def test_layouts_meet_the_budget_over_all_layers(budget: Budget, count: int) -> None:
    layers = [layer(3.0**i, 5.0**-i, ((32, 64), (64, 16))[i % 2]) for i in range(count)]
    known = profile(*layers)
    found = {i: known.layouts(i, budget) for i in known.layers}
    groups = [sum(getattr(x, s).variance.numel() for x in layers) for s in ("key", "value")]
    bits = budget.key_bits, budget.value_bits
    wanted = [bit * group for bit, group in zip(bits, groups, strict=True)]
    paid = [sum(spent(x, budget.shares, i) for x in found.values()) for i in (0, 1)]
    pairs = [(sum(wanted), sum(paid))] if budget.joint else list(zip(wanted, paid, strict=True))
    for target, price in pairs:
        assert target - max(budget.shares) - 1e-4 < price <= target + 1e-4
    for at, tiers in found.items():
        assert len(tiers) == len(budget.shares)
        for index, name in enumerate(("key", "value")):
            of = rates(tiers, index)
            assert of.shape[1:] == getattr(known.layers[at], name).variance.shape
            assert (of.diff(dim=0) <= 0).all(), "more important tiers have at least as many bits"
            assert (of.diff(dim=2) <= 0).all(), "groups of more variance as well"


@pytest.mark.parametrize("joint", [True, False])
def test_layouts_are_one_allocation_over_everything(joint: bool) -> None:
    """Restated: every group of every layer and side in one list, then put back one by one."""
    layers = [layer(1.0, 9.0), layer(4.0, 1.0, (64, 16)), layer(0.1, 0.2)]
    known, budget = profile(*layers), Budget(2.5, 1.5, joint, TIERS, (16.0, 4.0, 1.0))
    shared = Shared.of(layers)
    entries: dict[str, list[tuple[int, int, int, list[list[float]]]]] = {"key": [], "value": []}
    for at, one in known.layers.items():
        for name, cost in zip(("key", "value"), one.costs(shared, budget), strict=True):
            for head, group in itertools.product(*map(range, cost.shape[1:3])):
                entries[name].append((at, head, group, cost[:, head, group].tolist()))
    both = [("key", x) for x in entries["key"]] + [("value", x) for x in entries["value"]]
    mean = (2.5 * len(entries["key"]) + 1.5 * len(entries["value"])) / len(both)
    batches = [(both, mean)]
    if not joint:
        batches = [
            ([x for x in both if x[0] == name], bits)
            for name, bits in (("key", 2.5), ("value", 1.5))
        ]
    for batch, bits in batches:
        costs = torch.tensor([x[1][3] for x in batch]).transpose(0, 1)
        expected = allocate(costs, torch.tensor(TIERS), bits)
        for i, (name, (at, head, group, _)) in enumerate(batch):
            got = rates(known.layouts(at, budget), ("key", "value").index(name))
            assert got[:, head, group].tolist() == expected[:, i].tolist()


@pytest.mark.parametrize(("key", "value"), [(1e4, 1.0), (1.0, 1e4)])
def test_a_joint_budget_favours_the_costlier_side(key: float, value: float) -> None:
    one = layer(key, value)
    known = profile(one)
    tiers = {j: known.layouts(5, replace(PLAIN, joint=j)) for j in (True, False)}
    bits = {j: [float(rates(x, i).double().mean()) for i in (0, 1)] for j, x in tiers.items()}
    assert bits[False] == [2.0, 2.0]
    assert sum(bits[True]) == pytest.approx(4.0)
    dear = 0 if key > value else 1
    assert bits[True][dear] > bits[True][1 - dear] + 1


def test_costlier_layers_and_heads_get_more() -> None:
    """By the noise that matters, not by what a head weighed in a few texts."""
    cheap, dear = layer(), layer()
    dear.key.variance.mul_(1e3)
    dear.key.variance[0].mul_(1e3)
    cheap.key.weight[0] *= 1e5
    known = profile(cheap, dear)
    keys = {at: rates(known.layouts(at, PLAIN), 0)[0].double() for at in known.layers}
    assert float(keys[0].mean()) > float(keys[5].mean()) + 1
    assert float(keys[0][0].mean()) > float(keys[0][1].mean()) + 1


def test_tier_factors_are_worth_bits() -> None:
    known = profile(layer(), layer(), layer(), layer())
    budget = Budget(4.0, 4.0, True, (0.2, 0.3, 0.5), (16.0, 4.0, 1.0))
    every = torch.stack(
        [rates(known.layouts(at, budget), i) for at in (5, 0, 2, 9) for i in (0, 1)]
    )
    means = every.double().mean((0, 2, 3))
    assert means.diff().tolist() == pytest.approx([-1, -1], abs=0.25)


# -- profiles


def test_an_incomplete_profile_budgets_each_layer_alone() -> None:
    layers = [layer(), layer()]
    for one in (layers[1].key, layers[1].value):
        one.variance.mul_(1e4)
    growing = profile(*layers, complete=False)
    for at, one in zip((5, 0), layers, strict=True):
        tiers = growing.layouts(at, PLAIN)
        assert spent(tiers, (1.0,), 0) + spent(tiers, (1.0,), 1) == 32
        alone = Profile("abc", 32, "test", 600, {at: one}, True)
        assert tiers == alone.layouts(at, PLAIN)
    growing.complete = True
    together = [sum(pair.row_bytes for pair in growing.layouts(at, PLAIN)[0]) for at in (5, 0)]
    assert sum(together) == 64
    assert together[0] < 32 < together[1]


def test_layouts_are_worked_out_once_per_budget() -> None:
    known = profile(layer(), layer())
    first = known.layouts(0, PLAIN)
    assert known.layouts(0, Budget(2.0, 2.0, True, (1.0,), (1.0,))) is first
    assert known.layouts(0, replace(PLAIN, key_bits=3.0)) != first
    assert profile(*known.layers.values()).layouts(0, PLAIN) == first


def test_devices_get_one_copy_each() -> None:
    known = profile(layer())
    assert known.side(5, "key", CPU) is known.layers[5].key
    meta = torch.device("meta")
    there = known.side(5, "value", meta)
    assert all(x.device.type == "meta" for x in vars(there).values())
    assert there.forward.shape == known.layers[5].value.forward.shape
    assert known.side(5, "value", meta) is there
    assert known.layers[5].value.forward.device == CPU


def test_bytes_are_those_of_all_tensors() -> None:
    known = profile(layer(), layer(dims=(64, 16)))
    dims = [32, 32, 64, 16]
    floats = sum(2 * (2 * dim * dim + dim + 2 * (dim // 8) + 1) for dim in dims)
    assert known.nbytes == 4 * floats
    assert Profile("abc", 32, "test", 0).nbytes == 0


def test_copies_of_a_cache_share_the_profile() -> None:
    known = profile(layer())
    assert copy.deepcopy({"cache": [known]})["cache"][0] is known
