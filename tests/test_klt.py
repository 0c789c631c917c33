"""The weighted KLT: its inverse, what noise in it costs, and that no basis compacts better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.math.klt import RIDGE, weighted_klt


def positive(heads: int, dim: int, rank: int | None = None, spread: float = 1.0) -> Tensor:
    """Random symmetric (heads, dim, dim), positive semi-definite, of a rank."""
    root = torch.randn(heads, dim, rank or 2 * dim) * torch.logspace(0, spread, dim)[:, None]
    return root @ root.mT


def ridged(metric: Tensor) -> Tensor:
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return metric + RIDGE * mean * torch.eye(metric.shape[-1])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 16), (2, 64), (1, 128)])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_definition(heads: int, dim: int, spread: float) -> None:
    covariance, metric = positive(heads, dim, spread=spread), positive(heads, dim)
    forward, inverse, variance = weighted_klt(covariance, metric)
    assert forward.dtype == inverse.dtype == variance.dtype == torch.float32
    assert forward.shape == inverse.shape == (heads, dim, dim)
    eye = torch.eye(dim).expand(heads, dim, dim)
    close(inverse.double() @ forward.double(), eye.double())
    # |T x|^2 is the metric, so noise in T x costs the same in all directions.
    close(forward.mT @ forward, ridged(metric))
    close(inverse.mT @ ridged(metric) @ inverse, eye)
    # The coordinates are uncorrelated, with the reported variances.
    close(forward @ covariance @ forward.mT, torch.diag_embed(variance))
    assert (variance.diff(dim=-1) <= 0).all()
    assert (variance >= 0).all()


def test_noise_of_one_size_costs_the_same_in_every_coordinate() -> None:
    metric = positive(2, 16, spread=1.0)
    _, inverse, _ = weighted_klt(positive(2, 16), metric)
    noise = inverse @ torch.eye(16)  # unit noise in one coordinate after another
    cost = (noise * (ridged(metric) @ noise)).sum(-2)
    torch.testing.assert_close(cost, torch.ones(2, 16), rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 15))
def test_leading_coordinates_hold_the_most_weighted_energy(seed: int, count: int) -> None:
    """Dropping the last coordinates loses less than any other projection of that rank."""
    torch.manual_seed(seed)
    covariance, metric = positive(1, 16, spread=0.5), positive(1, 16)
    _, _, variance = weighted_klt(covariance, metric)
    root = torch.linalg.cholesky(ridged(metric)[0]).mT  # |root x|^2 is the cost
    cloud = root @ covariance[0] @ root.mT
    other = torch.linalg.qr(torch.randn(16, count)).Q
    held = float((other.mT @ cloud @ other).trace())
    assert float(variance[0, :count].sum()) >= held * (1 - 1e-4)
    assert float(variance.sum()) == pytest.approx(float(cloud.trace()), rel=1e-3)


def test_without_a_metric_it_is_the_plain_karhunen_loeve_transform() -> None:
    covariance = positive(2, 24, spread=1.0)
    forward, _, variance = weighted_klt(covariance, torch.eye(24).expand(2, 24, 24))
    plain = forward / (1 + RIDGE) ** 0.5
    close(plain @ plain.mT, torch.eye(24).expand(2, 24, 24))
    close(variance, torch.linalg.eigvalsh(covariance).flip(-1) * (1 + RIDGE))


def test_directions_that_no_query_asks_about_still_count() -> None:
    query = torch.randn(16)
    metric = torch.outer(query, query)[None]
    forward, inverse, variance = weighted_klt(positive(1, 16), metric)
    assert all(torch.isfinite(x).all() for x in (forward, inverse, variance))
    close(inverse @ forward, torch.eye(16)[None])
    silent = torch.randn(16)
    silent -= query * (silent @ query) / (query @ query)
    cost = (forward[0] @ silent).square().sum()
    share = RIDGE * float(query @ query) / 16
    assert float(cost) == pytest.approx(share * float(silent @ silent), rel=1e-2)


@pytest.mark.parametrize("covariance", ["none", "one direction"])
@pytest.mark.parametrize("metric", ["none", "all"])
def test_nothing_varies_or_nothing_matters(covariance: str, metric: str) -> None:
    clouds = torch.zeros(2, 8, 8) if covariance == "none" else positive(2, 8, rank=1)
    weights = torch.zeros(2, 8, 8) if metric == "none" else positive(2, 8)
    forward, inverse, variance = weighted_klt(clouds, weights)
    assert all(torch.isfinite(x).all() for x in (forward, inverse, variance))
    close(inverse.double() @ forward.double(), torch.eye(8).expand(2, 8, 8).double())
    expected = 0 if covariance == "none" or metric == "none" else 2
    assert int((variance > 1e-6 * variance.max().clamp(min=1)).sum()) == expected


def test_signs_are_fixed() -> None:
    """An eigenvector's largest component is positive, so equal input gives equal profiles."""
    covariance, metric = positive(3, 16), torch.eye(16).expand(3, 16, 16)
    forward, _, _ = weighted_klt(covariance, metric)
    largest = forward.gather(-1, forward.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    again = weighted_klt(covariance.clone(), metric.clone())[0]
    assert torch.equal(forward, again)
    # Which way round the coordinates come does not matter either.
    flipped = weighted_klt(covariance.flip(-1, -2), metric)[0].flip(-1)
    close(flipped, forward, 1e-3)


def test_heads_do_not_see_each_other() -> None:
    covariance, metric = positive(3, 16), positive(3, 16)
    together = weighted_klt(covariance, metric)
    for head in range(3):
        alone = weighted_klt(covariance[head : head + 1], metric[head : head + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            close(one[0], all_of_them[head], 1e-5)
