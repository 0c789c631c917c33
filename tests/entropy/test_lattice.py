"""E8 without a box, against brute force and against loops written out."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from nexusquant.entropy import lattice
from nexusquant.entropy.lattice import (
    FAR,
    NOISE,
    Steps,
    nearest,
    quantize,
    quantize_ref,
    reconstruct,
    reconstruct_ref,
)
from nexusquant.kernels import use_operator


def neighbours() -> Tensor:
    """(241, 8): 0 and the 240 shortest vectors of E8."""
    pairs = []
    for i, j in combinations(range(8), 2):
        for a, b in product((-1.0, 1.0), repeat=2):
            vector = [0.0] * 8
            vector[i], vector[j] = a, b
            pairs.append(vector)
    halves = [x for x in product((-0.5, 0.5), repeat=8) if sum(a < 0 for a in x) % 2 == 0]
    return torch.tensor([[0.0] * 8, *pairs, *map(list, halves)])


def point_of(n: Tensor, coset: Tensor) -> Tensor:
    return n + coset[..., None] / 2


def test_the_shortest_vectors_are_those_of_e8() -> None:
    shortest = neighbours()
    assert len(shortest) == 241
    assert torch.equal(shortest[1:].square().sum(-1), torch.full((240,), 2.0))


@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0])
def test_no_neighbour_is_nearer(spread: float) -> None:
    # The Voronoi relevant vectors of E8 are its 240 shortest and 2160 next ones (SPLAG ch. 21); one
    # of the 2160 is the sum of two of the 240 at right angles, so all sums of two are looked at.
    x = spread * torch.randn(300, 8)
    n, coset = nearest(x)
    point, step = point_of(n, coset), neighbours()
    assert (n.sum(-1) % 2 == 0).all()
    assert n.dtype == torch.int32
    assert coset.dtype == torch.bool
    found = (x - point).square().sum(-1)
    both = torch.cat([step, (step[:, None] + step).flatten(0, 1).unique(dim=0)])
    for i in range(len(x)):
        assert found[i] <= (x[i] - point[i] - both).square().sum(-1).min() + 1e-5


def test_points_are_their_own_nearest() -> None:
    n = torch.randint(-1000, 1000, (200, 8), dtype=torch.int32)
    n[:, 0] += n.sum(-1) & 1
    coset = torch.rand(200) < 0.5
    again = nearest(point_of(n, coset))
    assert torch.equal(again[0], n)
    assert torch.equal(again[1], coset)


def test_moving_by_a_point_moves_the_nearest() -> None:
    x, step = torch.rand(50, 8) - 0.5, neighbours()
    start = point_of(*nearest(x))
    for move in step[::16]:
        assert torch.equal(point_of(*nearest(x + 4 * move)), start + 4 * move)


def test_mean_error_is_that_of_e8() -> None:
    x = 100 * torch.rand(40000, 8)
    error = (x - point_of(*nearest(x))).square().mean()
    assert error == pytest.approx(NOISE, rel=0.01)


def test_far_coordinates_are_clipped() -> None:
    x = torch.zeros(2, 8)
    x[0, 3], x[1, 5] = 3e38, -1e12
    n, _ = nearest(x)
    assert n[0, 3] == FAR
    assert n[1, 5] == -FAR


def test_sums_beyond_floats_have_their_parity() -> None:
    x = torch.full((1, 8), float(FAR // 2 - 1))  # odd, as is their sum to a float32
    x[0, 0] += 1
    n, coset = nearest(x)
    assert int(n.long().sum()) % 2 == 0
    assert not coset.any()


def pages(tokens: int, groups: int) -> tuple[Tensor, Steps]:
    dim = 8 * groups
    size = torch.exp2(torch.randint(-4, 9, (3, tokens)) / 2 - 2)
    variance = torch.exp2(torch.linspace(4, -8, dim)) * torch.tensor([[1.0], [0.4]])
    y = torch.randn(3, tokens, dim) * variance[0].sqrt()
    return y, Steps(size, variance, torch.linspace(0.98, 0, dim))


def test_prediction_is_a_loop_over_what_was_decoded() -> None:
    y, steps = pages(7, 2)
    n, coset = quantize(y, steps)
    decoded = reconstruct(n, coset, steps)
    for page in range(3):
        past = torch.zeros(16)
        for t in range(7):
            size, variance = steps.size[page, t], steps.variance[min(t, 1)]
            guess = steps.decay * past
            left = (y[page, t] - guess) * variance / (variance + NOISE * size**2)
            expected = nearest((left / size).view(2, 8))
            assert torch.equal(n[page, t].view(2, 8), expected[0])
            assert torch.equal(coset[page, t], expected[1])
            past = guess + point_of(*expected).flatten() * size
            torch.testing.assert_close(decoded[page, t], past)


@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (2, 16), (33, 17), (5, 40), (4, 0), (0, 3)])
def test_the_compiled_loops_are_the_definition(
    each_operator: str, tokens: int, groups: int
) -> None:
    y, steps = pages(tokens, groups)
    n, coset = quantize(y, steps)
    expected = quantize_ref(y, steps)
    assert torch.equal(n, expected[0])  # no ties among random numbers
    assert torch.equal(coset, expected[1])
    exactly = reconstruct_ref(n, coset, steps)
    torch.testing.assert_close(reconstruct(n, coset, steps), exactly, rtol=0, atol=1e-5)


def test_ties_cost_the_same(each_operator: str) -> None:
    # Halves and quarters: several points are equally near.
    y = torch.randint(-8, 8, (2, 50, 24)) / 4
    steps = Steps(torch.ones(2, 50), torch.full((2, 24), 1e12), torch.zeros(24))
    far = [
        (y - reconstruct_ref(*found, steps)).unflatten(-1, (3, 8)).square().sum(-1)
        for found in (quantize(y, steps), quantize_ref(y, steps))
    ]
    torch.testing.assert_close(*far)


def test_far_coordinates_are_clipped_by_all(each_operator: str) -> None:
    y = torch.zeros(1, 2, 16)
    y[0, 0, 3], y[0, 1, 15] = 3e38, -3e38
    steps = Steps(torch.ones(1, 2), torch.ones(2, 16), torch.zeros(16))
    n, _ = quantize(y, steps)
    assert int(n[0, 0, 3]) == FAR
    assert int(n[0, 1, 15]) == -FAR


def test_loops_take_what_is_not_contiguous(each_operator: str) -> None:
    y, steps = pages(9, 4)
    wide = torch.stack([y, y], -1)[..., 0]
    assert not wide.is_contiguous()
    n, coset = quantize(wide, steps)
    assert torch.equal(n, quantize_ref(y, steps)[0])
    part = reconstruct(n[..., 8:24], coset[..., 1:3], Steps(steps.size, y, steps.decay[8:24]))
    whole = reconstruct_ref(n, coset, steps)[..., 8:24]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


def test_compiled_loops_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")

    def fail(*args: object) -> None:
        raise AssertionError("the definition was called")

    monkeypatch.setattr(lattice, "quantize_ref", fail)
    monkeypatch.setattr(lattice, "reconstruct_ref", fail)
    y, steps = pages(3, 1)
    before = use_operator("numba")
    try:
        reconstruct(*quantize(y, steps), steps)
    finally:
        use_operator(before)
