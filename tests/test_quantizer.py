"""The quantizer against its definition, its error against Gaussian bounds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nexusquant.errors import NonFiniteError
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, DISTORTION, HEADROOM, levels, nearest_ref
from nexusquant.math.gains import LIMIT, decode_gain, encode_gain
from nexusquant.math.transform import orthonormal
from nexusquant.profile import LayerProfile, Profile, Side
from nexusquant.quantizer import Centre, Orthonormal, Profiled, Quantizer

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
PLAIN = Centre(torch.zeros(1, 1, 1, 1))
MIXED = ((4, 3, 2, 0), (1, 0, 8, 2), (0, 0, 0, 0))


def quantizer(
    heads: int = 2, dim: int = 64, bits: int = 2, transform: str = "hadamard", **settings: object
) -> Quantizer:
    layout = RowLayout(((bits,) * (dim // 8),) * heads)
    return Quantizer(layout, Orthonormal(transform, dim), **settings)


def profile(heads: int, dim: int) -> Profile:
    """One layer, number 3, whose transforms are far from orthonormal and differ by head."""

    def side() -> Side:
        forward = torch.eye(dim) * 2 + 0.2 * torch.randn(heads, dim, dim)
        return Side(
            forward, forward.double().inverse().float(), torch.randn(heads, dim) * 5,
            torch.ones(heads, dim // 8), torch.ones(heads), torch.ones(heads, dim // 8),
        )  # fmt: skip

    return Profile("f", 0, "test", 1, {3: LayerProfile(side(), side())}, True)


def gain_of(q: Quantizer, v: Tensor, rates: Tensor) -> float:
    """The size of v (coded coordinates), or what up to six codes more make cheaper in all, where
    clipping costs more than all granular noise: in units of which both are counted."""
    tables = [levels(int(b), q.levels, q.overload * HEADROOM[int(b)]) for b in rates]
    reach = torch.stack([table[-1] for table in tables])
    unit = torch.tensor(DISTORTION)[rates]
    code = int(encode_gain(v.square().mean().sqrt().float()))
    gains = decode_gain(torch.arange(code, min(code + 6, 15) + 1)).tolist()
    clipped = [float(((v.abs() - reach * g).clamp(min=0) ** 2 / unit).sum()) for g in gains]
    if clipped[0] <= len(v) * gains[0] ** 2:
        return gains[0]
    return min(zip(clipped, gains, strict=True), key=lambda x: x[0] + len(v) * x[1] ** 2)[1]


def reference(q: Quantizer, x: Tensor, matrix: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """T((x - m) / s) / g to the nearest codeword and back, group by group, in float64."""
    y = ((x.double() - mean) / scale) @ matrix.double().mT
    out = torch.zeros_like(y)
    for head, rates in enumerate(q.layout.rates):
        spots = [slice(8 * g, 8 * g + 8) for g, bits in enumerate(rates) if bits]
        if not spots:
            continue
        own = torch.cat([y[:, head, :, spot] for spot in spots], -1)
        used = torch.tensor([bits for bits in rates if bits]).repeat_interleave(8)
        gain = torch.tensor([[gain_of(q, v, used) for v in row] for row in own])[..., None].double()
        for spot, bits in zip(spots, filter(None, rates), strict=True):
            table = levels(bits, q.levels, q.overload * HEADROOM[bits]).double()
            unit = y[:, head, :, spot] / gain
            out[:, head, :, spot] = table[nearest_ref(unit, table)] * gain
    return out @ matrix.double().inverse().mT * scale + mean


def check(q: Quantizer, x: Tensor, centre: Centre, expected: Tensor) -> None:
    rows, gains = q.encode(x, centre)
    assert rows.shape == (len(x), q.layout.row_bytes, x.shape[2])
    assert gains.shape == x.shape[:3]
    assert rows.dtype == gains.dtype == torch.uint8
    assert gains.max() <= 15
    back = q.decode(rows, gains, centre)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, expected.float(), rtol=1e-4, atol=1e-4)
    inner = q.coordinates(rows, gains)
    assert inner.shape == x.shape
    assert torch.equal(q.leave(inner, centre), back)


@pytest.mark.parametrize("transform", ["hadamard", "identity"])
@pytest.mark.parametrize("kind", ["companded", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("overload", [0.9, 1.3])  # others meet ties at 8 bits
def test_encoding_is_the_definition(transform: str, kind: str, bits: int, overload: float) -> None:
    q = quantizer(3, 40, bits, transform, levels=kind, overload=overload)
    x = torch.randn(2, 3, 17, 40) * torch.rand(2, 3, 17, 1) * 30 + torch.randn(40)
    mean = x.mean(2, keepdim=True).half()
    scale = (x.std(2, keepdim=True) * (1 + torch.rand(40))).half()
    matrix = orthonormal(transform, 40)[None]
    check(q, x, Centre(mean, scale), reference(q, x, matrix, mean.double(), scale.double()))


def test_rates_differ_between_groups_and_heads() -> None:
    q = Quantizer(RowLayout(MIXED), Orthonormal("hadamard", 32))
    assert [q.book[bits].widen for bits in BITS] == [HEADROOM[bits] for bits in BITS]
    x = torch.randn(2, 3, 9, 32)
    expected = reference(q, x, orthonormal("hadamard", 32)[None], 0.0, 1.0)
    check(q, x, PLAIN, expected)
    assert not expected[:, 2].any()


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("own_centre", [True, False])
def test_a_profiles_transform_and_mean(side: str, own_centre: bool) -> None:
    known = profile(3, 32)
    q = Quantizer(RowLayout(MIXED), Profiled(known, 3, side))
    tensors: Side = getattr(known.layers[3], side)
    x = torch.randn(2, 3, 9, 32) * 3 + tensors.mean[:, None]
    mean, scale = tensors.mean[None, :, None].double(), torch.ones(1).double()
    centre = Centre()
    if own_centre:
        mean, scale = torch.randn(2, 3, 1, 32).double(), 0.5 + torch.rand(2, 3, 1, 1).double()
        centre = Centre(mean.float(), scale.float())
    check(q, x, centre, reference(q, x, tensors.forward, mean, scale))


@pytest.mark.parametrize("heads", [(0,), (0, 2), (1, 2), (2,)])
@pytest.mark.parametrize("profiled", [True, False])
@pytest.mark.parametrize("own_centre", [True, False])
def test_some_heads_are_coded_as_among_all(
    heads: tuple[int, ...], profiled: bool, own_centre: bool
) -> None:
    basis = Profiled(profile(3, 32), 3, "key") if profiled else Orthonormal("hadamard", 32)
    q = Quantizer(RowLayout(MIXED), basis)
    x = torch.randn(2, 3, 9, 32) * 3
    centre = Centre()
    if own_centre:
        centre = Centre(torch.randn(2, 3, 1, 32).half(), 0.5 + torch.rand(2, 3, 1, 1).half())
    rows, gains = q.encode(x, centre)
    some = q.of_heads(heads)
    own_rows, own_gains = some.encode(x[:, list(heads)], centre)
    mine = torch.isin(q.layout.head_of_byte(CPU), torch.tensor(heads))
    assert torch.equal(own_rows, rows[:, mine])
    assert torch.equal(own_gains, gains[:, list(heads)])
    decoded = some.decode(own_rows, own_gains, centre)
    torch.testing.assert_close(decoded, q.decode(rows, gains, centre)[:, list(heads)])
    assert some != q
    assert some == q.of_heads(heads)
    assert q.of_heads(None) is q


def test_bases() -> None:
    known = profile(2, 16)
    for basis in (Orthonormal("hadamard", 16), Profiled(known, 3, "key")):
        product = basis.forward(CPU) @ basis.inverse(CPU)
        torch.testing.assert_close(product, torch.eye(16).expand_as(product), rtol=0, atol=1e-5)
    assert not Orthonormal("identity", 16).mean(CPU).any()
    assert Profiled(known, 3, "key").forward(CPU) is known.layers[3].key.forward
    assert Profiled(known, 3, "value").mean(CPU).shape == (1, 2, 1, 16)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_stays_near_the_gaussian_figure_at_every_size(bits: int) -> None:
    """The token gain is coarse, but dividing by the decoded one costs little."""
    q = quantizer(2, 128, bits, overload=1 / HEADROOM[bits])
    for size, excess in ((0.3, 1.03), (1.0, 1.03), (2.5, 1.03), (6.0, 1.2), (100.0, 1.15)):
        x = torch.randn(1, 2, 400, 128) * size
        error = (q.decode(*q.encode(x, PLAIN), PLAIN) - x).square().mean() / size**2
        assert float(error) < excess * DISTORTION[bits]


@pytest.mark.parametrize(("bits", "less"), [(4, 0.3), (8, 0.05)])
def test_a_vector_with_one_large_coordinate_gets_the_gain_it_needs(
    bits: int, less: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, x = quantizer(2, 256, bits, "identity"), torch.randn(1, 2, 50, 256)
    x[:, :, ::5, 3] = 40.0
    check(q, x, PLAIN, reference(q, x, torch.eye(256)[None], 0.0, 1.0))
    large, error = x[:, :, ::5], []
    for steps in (6, 0):
        monkeypatch.setattr("nexusquant.kernels.reference._STEPS", steps)
        monkeypatch.setattr("nexusquant.quantizer.operator_for", lambda _: Reference())
        error.append((q.decode(*q.encode(large, PLAIN), PLAIN) - large).square().mean())
    assert error[0] < less * error[1]


def test_the_error_of_sums_follows_from_the_sum_of_coordinates() -> None:
    """What attention relies on: leaving code space once, after weights that add to 1."""
    q, x = quantizer(), torch.randn(2, 2, 7, 64)
    centre = Centre(torch.randn(2, 2, 1, 64), 1 + torch.rand(2, 2, 1, 64))
    rows, gains = q.encode(x, centre)
    weights = torch.rand(2, 2, 3, 7).softmax(-1)
    at_once = q.leave(weights @ q.coordinates(rows, gains), centre)
    torch.testing.assert_close(at_once, weights @ q.decode(rows, gains, centre))


def test_hadamard_beats_identity_where_one_channel_dominates() -> None:
    x = torch.randn(1, 2, 300, 64)
    x[..., 5] *= 20
    error = {}
    for name in ("hadamard", "identity"):
        q = quantizer(transform=name)
        error[name] = (q.decode(*q.encode(x, PLAIN), PLAIN) - x).square().mean()
    assert error["hadamard"] < 0.35 * error["identity"]


def test_vectors_at_the_mean_keep_only_the_smallest_gains_noise() -> None:
    q, mean = quantizer(bits=4), (torch.randn(1, 2, 1, 64) * 100).half()
    x = mean.float().expand(1, 2, 5, 64)
    rows, gains = q.encode(x, Centre(mean))
    assert not gains.any()
    error = (q.decode(rows, gains, Centre(mean)) - x).square().mean().sqrt()
    innermost = float(q.book[4].levels().abs().min())
    assert float(error) == pytest.approx(0.25 * innermost, rel=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6, 1e30])
def test_what_has_no_gain_is_refused(bad: float) -> None:
    q, x = quantizer(), torch.randn(1, 2, 7, 64)
    x[0, 1, 3] = bad
    x[0, 0, 2, 0] = bad  # one 1e6 among 64 still leaves an RMS of 125,000
    with pytest.raises(NonFiniteError, match=rf"2 of 14 vectors .* {LIMIT:.0f}"):
        q.encode(x, PLAIN)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_even_what_is_not_stored_may_be_non_finite(bad: float) -> None:
    q = Quantizer(RowLayout(((2, 0), (0, 0))), Orthonormal("identity", 16))
    x = torch.randn(1, 2, 3, 16)
    x[0, 0, 1, 12] = x[0, 1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match="2 of 6"):
        q.encode(x, PLAIN)


def test_the_limit_is_relative_to_the_sequence() -> None:
    x = torch.full((1, 2, 3, 64), 60_000.0).half()
    q = quantizer(bits=4)
    with pytest.raises(NonFiniteError):
        q.encode(x, PLAIN)
    centre = Centre(torch.zeros(1, 2, 1, 64), torch.full((1, 2, 1, 1), 60_000.0))
    back = q.decode(*q.encode(x, centre), centre)
    assert float((back - x).square().mean().sqrt()) < 0.5 * 60_000


def test_centres_may_be_half_precision_and_are_mapped_whole() -> None:
    x = torch.randn(3, 2, 5, 64)
    centre = Centre(torch.randn(3, 2, 1, 64).half(), 1 + torch.rand(3, 2, 1, 1).half())
    q = quantizer()
    turned = centre.map(lambda t: t.flip(0))
    rows, gains = q.encode(x, centre)
    flipped = q.decode(rows.flip(0), gains.flip(0), turned)
    assert torch.equal(flipped, q.decode(rows, gains, centre).flip(0))
    assert replace(centre, mean=None).map(torch.clone).mean is None
    assert Centre().map(lambda t: t / 0) == Centre()
