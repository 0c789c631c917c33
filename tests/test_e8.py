"""E8C: exact search against independent oracles, distortion against scalar codes, pinned bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.math.e8 import _CHUNK, BITS, DISTORTION, HEADROOM, E8Code, levels, nearest_ref

KINDS = ("uniform", "companded")
CODES = [E8Code(bits, kind) for bits in BITS for kind in KINDS]

# Mean squared error per dimension on a unit Gaussian that equally spaced levels must not exceed.
UNIFORM_MSE = (0.342, 0.103, 0.032, 0.010, 0.00305, 0.00091, 0.00027, 0.000078)
SCALAR_MSE = (0.3634, 0.1175, 0.0346, 0.0095)


def book(code: E8Code) -> Tensor:
    """All codewords from the definition: u_i = 2 n_i + c with an even sum of n. Float64."""
    n = torch.cartesian_prod(*[torch.arange(2**code.bits)] * 8)
    n = n[n.sum(1) % 2 == 0]
    return code.levels().double()[torch.cat([2 * n, 2 * n + 1])]


def lowest_cost(x: Tensor, table: Tensor) -> Tensor:
    """Squared distance to the nearest codeword, by dynamic programming over the parity."""
    cost = (x.double()[..., None] - table.double()) ** 2
    best = []
    for coset in (0, 1):
        by_n = cost[..., coset::2]
        even, odd = by_n[..., 0::2].amin(-1), by_n[..., 1::2].amin(-1)
        total = even[..., 0], odd[..., 0]
        for i in range(1, 8):
            total = (
                torch.minimum(total[0] + even[..., i], total[1] + odd[..., i]),
                torch.minimum(total[1] + even[..., i], total[0] + odd[..., i]),
            )
        best.append(total[0])
    return torch.minimum(*best)


def pack(u: list[int], bits: int) -> bytes:
    """The byte format as the module describes it, bit by bit."""
    coset, low = u[0] % 2, min(bits, 4)
    n = [(value - coset) // 2 for value in u]
    fields = [(n[i] & ~1 | sum(n[i:]) % 2) % 2**low for i in range(8)]
    fields[0] |= coset  # its lowest bit is the parity of all, which is even
    word = sum(field << low * i for i, field in enumerate(fields))
    rest = sum(value // 16 << (bits - low) * i for i, value in enumerate(n))
    return word.to_bytes(low, "little") + rest.to_bytes(bits - low, "little")


def all_words(bits: int) -> Tensor:
    words = torch.arange(1 << 8 * bits)
    return torch.stack([words >> 8 * plane & 255 for plane in range(bits)], -1).to(torch.uint8)


def random_words(bits: int, count: int) -> Tensor:
    return torch.randint(0, 256, (count, bits), dtype=torch.uint8)


def stress(count: int) -> Tensor:
    """Mostly Gaussian groups, some far outside the box, some with one outlier."""
    x = torch.randn(count, 8)
    x[: count // 10] *= 4
    x[count // 10 : count // 5, 3] *= 10
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2])
def test_encoding_is_the_nearest_of_all_words(bits: int, kind: str) -> None:
    code = E8Code(bits, kind)
    x, points = stress(5000), book(code)
    assert len(points) == 1 << 8 * bits
    # The nearest p has the largest x.p - |p|^2 / 2: one product, the norm as a ninth coordinate.
    norm = points.square().sum(1, keepdim=True)
    lifted = torch.cat([points, -norm / 2], 1).float().T.contiguous()
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    nearest = points[torch.cat([(part @ lifted).argmax(1) for part in rows.split(32)])]
    for mine in (code.decode(code.encode(x)), code.levels()[nearest_ref(x, code.levels())]):
        differ = (mine != nearest.float()).any(1)
        gap = [(x.double() - p.double()).square().sum(1)[differ] for p in (mine, nearest)]
        assert ((gap[0] - gap[1]).abs() < 1e-5).all(), "another word is closer"
        assert differ.sum() <= 2, "more than chance ties"


@pytest.mark.parametrize("code", CODES, ids=str)
def test_encoding_has_the_lowest_cost_there_is(code: E8Code) -> None:
    x = stress(max(1000, 40_000 >> code.bits))
    mine = code.decode(code.encode(x))
    reference = code.levels()[nearest_ref(x, code.levels())]
    best = lowest_cost(x, code.levels())
    for point in (mine, reference):
        cost = (x.double() - point.double()).square().sum(-1)
        torch.testing.assert_close(cost, best, rtol=1e-6, atol=1e-6)
    assert (mine != reference).any(1).sum() <= 2


def scalar_lloyd_max(bits: int) -> float:
    """MSE of the optimal scalar quantizer of a unit Gaussian with 2^bits levels."""
    table = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(2000):
        edge = torch.cat(
            [torch.tensor([-40.0]), (table[1:] + table[:-1]) / 2, torch.tensor([40.0])]
        )
        probability = torch.special.ndtr(edge).diff()
        density = torch.exp(-edge.square() / 2) / math.sqrt(2 * math.pi)
        table = -density.diff() / probability
    return float(1 - (probability * table.square()).sum())


@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_as_tabulated_and_below_the_scalar_quantizer(bits: int) -> None:
    x = torch.randn(200_000, 8)
    mse = {}
    for kind in KINDS:
        code = E8Code(bits, kind)
        data = code.encode(x)
        assert 8 * data.numel() == bits * x.numel()
        mse[kind] = float((code.decode(data) - x).double().square().mean())
    assert mse["companded"] == pytest.approx(DISTORTION[bits], rel=0.02)
    assert mse["companded"] > 4**-bits, "below the Shannon bound"
    assert mse["uniform"] <= UNIFORM_MSE[bits - 1]
    if bits <= len(SCALAR_MSE):
        scalar = scalar_lloyd_max(bits)
        assert scalar == pytest.approx(SCALAR_MSE[bits - 1], abs=1e-4)
    else:  # Panter and Dite's limit, which finite rates approach from below
        scalar = math.pi * math.sqrt(3) / 2 * 4**-bits
    assert mse["companded"] < 0.95 * scalar
    # From 4 bits on, equally spaced levels cannot beat optimal ones: that takes companding.
    assert (mse["uniform"] < scalar) == (bits < 4)


def test_the_distortion_table_serves_the_allocation() -> None:
    """Greedy allocation needs falling distortion that is convex in the rate; 0 bits cost it all."""
    assert DISTORTION[0] == 1
    assert len(DISTORTION) == len(BITS) + 1 == len(HEADROOM) + 1
    gains = [a - b for a, b in itertools.pairwise(DISTORTION)]
    assert all(a > b > 0 for a, b in itertools.pairwise(gains))
    assert all(1 <= HEADROOM[bits] <= 2 for bits in BITS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2])
def test_all_words_of_low_rates_are_distinct_codewords_and_come_back(bits: int, kind: str) -> None:
    code, words = E8Code(bits, kind), all_words(bits)
    points = code.decode(words)
    assert torch.equal(points, code.decode_ref(words))
    assert torch.equal(code.encode(points), words)
    u = code.unpack(words)
    assert torch.equal(u % 2, (u[:, :1] % 2).expand_as(u))
    assert (((u - u % 2) // 2).sum(1) % 2 == 0).all()
    assert (u * 8 ** torch.arange(8)).sum(1).unique().numel() == 1 << 8 * bits


@pytest.mark.parametrize("code", [code for code in CODES if code.bits > 2], ids=str)
def test_words_of_higher_rates_come_back(code: E8Code) -> None:
    words = random_words(code.bits, 20_000)
    points = code.decode(words)
    assert torch.equal(code.encode(points), words)
    assert torch.equal(points, code.decode_ref(words))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 1), st.data())
def test_bytes_follow_the_documented_format(bits: int, coset: int, data: st.DataObject) -> None:
    n = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8, max_size=8))
    n[0] ^= sum(n) & 1
    u = [2 * value + coset for value in n]
    code = E8Code(bits)
    packed = code.encode(code.levels()[u])
    assert bytes(packed.tolist()) == pack(u, bits)
    assert code.unpack(packed).tolist() == u


# A wide group, one with outliers, a narrow one, all away from ties. A change in these bytes breaks
# every stored cache.
GOLDEN_INPUT = torch.tensor(
    [
        [0.34, -0.42, -0.51, 2.32, -0.14, -0.31, 2.64, -1.11],
        [9.03, 1.40, 0.70, -0.02, -9.01, -0.57, 1.13, -1.40],
        [0.01, 0.16, -0.42, -0.16, 0.04, 0.09, 0.08, 0.19],
    ]
)
GOLDEN = {
    (1, "uniform"): "717b01",
    (1, "companded"): "717b01",
    (2, "uniform"): "93312f254aaa",
    (2, "companded"): "9331ae304aaa",
    (3, "uniform"): "d5ae397e093da44692",
    (3, "companded"): "953c397f953da44692",
    (4, "uniform"): "69e6764fde9b714b88768888",
    (4, "companded"): "78e5673edf6a512c88669999",
    (5, "uniform"): "e2dcefae497fe3d1854700ed1111f3",
    (5, "companded"): "c2ddde8e499ff4a067471ffd1111f2",
    (6, "uniform"): "d26bde58d675dff7a02a6b641ffa111159aa",
    (6, "companded"): "94a8bc0cd6753ffb60cf6f243fc9112059aa",
    (7, "uniform"): "9597adcedcbc599feb51722f87553fd91130e34692",
    (7, "companded"): "2a416c16dcbe5d5ff2e0ae77073540a32162e44692",
    (8, "uniform"): "3aaf6bc678c6775ddfe6d124af79605a40b3306288778888",
    (8, "companded"): "6590c73f69e6674ebfe7e05ccf7a503b815742b588768888",
}


@pytest.mark.parametrize("code", CODES, ids=str)
def test_golden_bytes(code: E8Code) -> None:
    assert bytes(code.encode(GOLDEN_INPUT).flatten().tolist()).hex() == GOLDEN[code.bits, code.kind]


# The sum of i * level_i over the positive levels, counted from 1.
GOLDEN_LEVELS = {
    "uniform": (2.765, 12.3425, 54.2562, 238.6188, 1048.3088, 4587.9599, 19969.0625, 86375.0268),
    "companded": (2.7503, 12.4089, 51.8513, 213.8196, 954.4096, 3905.5279, 16075.5365, 64767.1118),
}


@pytest.mark.parametrize("code", CODES, ids=str)
def test_golden_levels(code: E8Code) -> None:
    """Levels are as much part of the format as the bytes."""
    table, half = code.levels(), 2**code.bits
    assert table.shape == (2 * half,)
    assert (table.diff() > 0).all()
    assert torch.equal(table, -table.flip(0))
    total = float((table.double()[half:] * torch.arange(1, half + 1)).sum())
    assert total == pytest.approx(GOLDEN_LEVELS[code.kind][code.bits - 1], rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 1, 5, 8), (_CHUNK + 3, 8)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_any_shape_and_stride(code: E8Code, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    data = code.encode(x)
    assert data.shape == (*shape[:-1], code.bits)
    assert data.dtype == torch.uint8
    strided = torch.randn(*shape, 2)
    strided[..., 1] = x
    assert torch.equal(code.encode(strided[..., 1]), data)
    u = nearest_ref(x.reshape(-1, 8), code.levels()).reshape(shape)
    assert torch.equal(code.decode(data), code.levels()[u])


@pytest.mark.parametrize("code", CODES, ids=str)
def test_codes_may_begin_at_any_byte(code: E8Code) -> None:
    words = random_words(code.bits, 1)[0]
    for offset in range(3):
        shifted = torch.cat([torch.zeros(offset, dtype=torch.uint8), words])[offset:]
        assert torch.equal(code.decode(shifted), code.decode_ref(words))


@pytest.mark.parametrize("bits", BITS)
def test_widened_levels_only_rescale(bits: int) -> None:
    x = stress(1000)
    assert torch.equal(E8Code(bits, widen=2.0).encode(2 * x), E8Code(bits).encode(x))
    assert torch.equal(levels(bits, widen=1.5), levels(bits) * 1.5)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_far_outliers_saturate(code: E8Code) -> None:
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    point = code.decode(code.encode(signs * 1e6))
    wrong = (point.sign() != signs).sum(1)
    # At 1 bit a coset has two levels per coordinate, and the parity may take the inner one's sign.
    assert wrong.max() == (1 if code.bits == 1 else 0)
    # One coordinate may step inwards to meet the parity, or all use the coset's outermost level.
    assert (point.abs() >= code.levels()[-2]).sum(1).min() >= 7


def test_levels_ignore_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        for bits, kind in itertools.product(BITS, KINDS):
            made = levels.__wrapped__(bits, kind)
            assert made.dtype == torch.float32
            assert torch.equal(made, levels(bits, kind))
    finally:
        torch.set_default_dtype(before)
