"""E8C: exact search against independent oracles, distortion against scalar codes, pinned bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.math.e8 import _CHUNK, BITS, E8Code, levels, nearest_ref

KINDS = ("uniform", "companded")
CODES = [E8Code(bits, kind) for bits in BITS for kind in KINDS]

# Mean squared error per dimension on a unit Gaussian that must not be exceeded.
LARGEST_MSE = {
    "uniform": {2: 0.103, 3: 0.032, 4: 0.010},
    "companded": {2: 0.098, 3: 0.027, 4: 0.0072},
}
SCALAR_MSE = {2: 0.1175, 3: 0.0346, 4: 0.0095}


def book(table: Tensor) -> Tensor:
    """All 2-bit codewords from the definition: u_i = 2 n_i + c with an even sum of n. Float64."""
    n = torch.cartesian_prod(*[torch.arange(4)] * 8)
    n = n[n.sum(1) % 2 == 0]
    return table.double()[torch.cat([2 * n, 2 * n + 1])]


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
    coset = u[0] & 1
    n = [(value - coset) // 2 for value in u]
    word = 0
    for i in range(8):
        low = sum(n[i:]) % 2 if i else coset
        word |= low << (2 * i) | ((n[i] >> 1) & 1) << (2 * i + 1)
    planes = [sum(((n[i] >> plane) & 1) << i for i in range(8)) for plane in range(2, bits)]
    return bytes([word & 255, word >> 8, *planes])


def all_words() -> Tensor:
    words = torch.arange(1 << 16)
    return torch.stack([words & 255, words >> 8], -1).to(torch.uint8)


def random_words(bits: int, count: int) -> Tensor:
    return torch.randint(0, 256, (count, bits), dtype=torch.uint8)


def stress(count: int) -> Tensor:
    """Mostly Gaussian groups, some far outside the box, some with one outlier."""
    x = torch.randn(count, 8)
    x[: count // 10] *= 4
    x[count // 10 : count // 5, 3] *= 10
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_2_bit_encoding_is_the_nearest_of_all_65536_words(kind: str) -> None:
    code = E8Code(2, kind)
    x, points = stress(10_000), book(code.levels())
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
    x = stress(20_000)
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
def test_distortion_is_below_the_scalar_quantizer_at_equal_bits(bits: int) -> None:
    scalar = scalar_lloyd_max(bits)
    assert scalar == pytest.approx(SCALAR_MSE[bits], abs=1e-4)
    x = torch.randn(200_000, 8)
    for kind in KINDS:
        code = E8Code(bits, kind)
        data = code.encode(x)
        assert 8 * data.numel() == bits * x.numel()
        mse = float((code.decode(data) - x).double().square().mean())
        assert mse <= LARGEST_MSE[kind][bits], (kind, mse)
        # At 4 bits equally spaced levels cannot beat optimal ones: that takes companding.
        assert mse < scalar or (kind, bits) == ("uniform", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_2_bit_words_are_distinct_codewords_and_come_back(kind: str) -> None:
    code, words = E8Code(2, kind), all_words()
    points = code.decode(words)
    assert torch.equal(points, code.decode_ref(words))
    assert torch.equal(code.encode(points), words)
    u = code.unpack(words)
    assert torch.equal(u % 2, (u[:, :1] % 2).expand_as(u))
    assert (((u - u % 2) // 2).sum(1) % 2 == 0).all()
    assert (u * 8 ** torch.arange(8)).sum(1).unique().numel() == 1 << 16


@pytest.mark.parametrize("code", [code for code in CODES if code.bits > 2], ids=str)
def test_words_of_higher_rates_come_back(code: E8Code) -> None:
    words = random_words(code.bits, 50_000)
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
        [0.30, -0.44, -0.53, 2.34, -0.17, -0.27, 2.66, -1.10],
        [9.03, 1.40, 0.70, -0.02, -9.01, -0.57, 1.13, -1.40],
        [0.01, 0.17, -0.42, -0.14, 0.05, 0.08, 0.04, 0.19],
    ]
)
GOLDEN = {
    (2, "uniform"): "93312f254aaa",
    (2, "companded"): "9331ae304aaa",
    (3, "uniform"): "f96e491e784fe000f3",
    (3, "companded"): "a96b499f7d47e000f3",
    (4, "uniform"): "a93efe49763da34fe0000cf3",
    (4, "companded"): "fcee7e49a7856b47a0550cf3",
}


@pytest.mark.parametrize("code", CODES, ids=str)
def test_golden_bytes(code: E8Code) -> None:
    assert bytes(code.encode(GOLDEN_INPUT).flatten().tolist()).hex() == GOLDEN[code.bits, code.kind]


# The sum of i * level_i over the positive levels, counted from 1.
GOLDEN_LEVELS = {
    (2, "uniform"): 12.3425,
    (2, "companded"): 12.4049,
    (3, "uniform"): 54.2562,
    (3, "companded"): 51.8993,
    (4, "uniform"): 238.6188,
    (4, "companded"): 216.5924,
}


@pytest.mark.parametrize("code", CODES, ids=str)
def test_golden_levels(code: E8Code) -> None:
    """Levels are as much part of the format as the bytes."""
    table, half = code.levels(), 2**code.bits
    assert table.shape == (2 * half,)
    assert (table.diff() > 0).all()
    assert torch.equal(table, -table.flip(0))
    total = float((table[half:] * torch.arange(1, half + 1)).sum())
    assert total == pytest.approx(GOLDEN_LEVELS[code.bits, code.kind], abs=1e-4)


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
    assert torch.equal(point.sign(), signs)
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
