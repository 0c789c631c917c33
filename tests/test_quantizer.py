"""The quantizer against its definition, its error against Gaussian bounds, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexusquant.allocation import uniform_layout
from nexusquant.errors import NonFiniteError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import levels, nearest_ref
from nexusquant.math.gains import LIMIT, decode_gain, encode_gain
from nexusquant.math.transform import orthonormal
from nexusquant.quantizer import Codes, Quantizer

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LARGEST_MSE = {2: 0.098, 3: 0.027, 4: 0.0072}  # of the companded code on unit Gaussians


def quantizer(heads: int = 2, dim: int = 64, bits: float = 2, **settings: object) -> Quantizer:
    return Quantizer(uniform_layout(heads, dim, bits), **settings)


def zero_mean(x: Tensor) -> Tensor:
    return torch.zeros(*x.shape[:2], 1, x.shape[-1])


def reference(q: Quantizer, x: Tensor, mean: Tensor) -> Tensor:
    """T(x - m) / g to the nearest codeword and back, group by group, in float64."""
    matrix = orthonormal(q.transform, q.dim).double()
    y = (x.double() - mean.double()) @ matrix.mT
    gain = decode_gain(encode_gain(y.square().mean(-1, keepdim=True).sqrt().float())).double()
    out = torch.zeros_like(y)
    for head, rates in enumerate(q.layout.rates):
        for group, bits in enumerate(rates):
            where = slice(8 * group, 8 * group + 8)
            if bits:
                table = levels(bits, q.levels, q.overload).double()
                unit = (y[:, head] / gain[:, head].clamp(min=1e-30))[..., where]
                out[:, head, :, where] = table[nearest_ref(unit, table)]
    return (out * gain) @ matrix + mean.double()


@pytest.mark.parametrize("transform", ["hadamard", "identity"])
@pytest.mark.parametrize("kind", ["companded", "uniform"])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
@pytest.mark.parametrize("overload", [1.0, 1.4])
def test_encoding_is_the_definition(
    transform: str, kind: str, bits: float, overload: float
) -> None:
    q = quantizer(3, 40, bits, transform=transform, levels=kind, overload=overload)
    x = torch.randn(2, 3, 17, 40) * torch.rand(2, 3, 17, 1) * 30 + torch.randn(40)
    mean = x.mean(2, keepdim=True).half()
    codes = q.encode(x, mean)
    assert codes.rows.shape == (2, 3, 17, q.layout.row_bytes)
    assert codes.gains.shape == (2, 3, 17)
    assert codes.rows.dtype == codes.gains.dtype == torch.uint8
    back = q.decode(codes, mean)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, reference(q, x, mean).float(), rtol=1e-4, atol=1e-4)
    inner = q.coordinates(codes) @ q.matrix(x.device) + mean.float()
    assert torch.equal(inner, back)


def test_rates_may_differ_between_heads() -> None:
    q = Quantizer(RowLayout(((4, 3, 2, 0), (2, 2, 0, 0), (0, 0, 0, 0))))
    assert (q.dim, set(q.codes)) == (32, {2, 3, 4})
    x = torch.randn(2, 3, 9, 32)
    mean = zero_mean(x)
    expected = reference(q, x, mean).float()
    torch.testing.assert_close(q.decode(q.encode(x, mean), mean), expected, rtol=1e-4, atol=1e-4)
    assert not expected[:, 2].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_stays_near_the_gaussian_figure_at_every_scale(bits: int) -> None:
    """The token gain is coarse, but dividing by the decoded one costs next to nothing."""
    q = quantizer(2, 128, bits)
    for scale in (1e-3, 1.0, 1e4):
        x = torch.randn(1, 2, 400, 128) * scale
        mean = zero_mean(x)
        error = (q.decode(q.encode(x, mean), mean) - x).square().mean() / scale**2
        assert float(error) < 1.04 * LARGEST_MSE[bits]


def test_hadamard_beats_identity_where_one_channel_dominates() -> None:
    x = torch.randn(1, 2, 300, 64)
    x[..., 5] *= 20
    error = {}
    for name in ("hadamard", "identity"):
        q = quantizer(transform=name)
        error[name] = (q.decode(q.encode(x, zero_mean(x)), zero_mean(x)) - x).square().mean()
    assert error["hadamard"] < 0.25 * error["identity"]


def test_the_mean_is_free_of_error() -> None:
    q, mean = quantizer(), (torch.randn(1, 2, 1, 64) * 100).half()
    x = mean.float().expand(1, 2, 5, 64)
    codes = q.encode(x, mean)
    assert not codes.gains.any()
    assert torch.equal(q.decode(codes, mean), x)


def test_tiny_vectors_become_zero() -> None:
    q, x = quantizer(), torch.full((1, 2, 3, 64), 1e-7)
    x[:, :, 1] = torch.finfo(torch.float32).tiny
    codes = q.encode(x, zero_mean(x))
    assert not q.decode(codes, zero_mean(x)).any()
    assert torch.equal(codes.rows, q.layout.encode(torch.zeros_like(x), q.codes))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6, 1e30])
def test_what_has_no_gain_is_refused(bad: float) -> None:
    q, x = quantizer(), torch.randn(1, 2, 7, 64)
    x[0, 1, 3] = bad
    x[0, 0, 2, 0] = bad  # one 1e6 among 64 still leaves an RMS of 125,000
    with pytest.raises(NonFiniteError, match=rf"2 of 14 vectors .* {LIMIT:.0f}"):
        q.encode(x, zero_mean(x))


def test_the_largest_fp16_vectors_are_accepted() -> None:
    x = torch.full((1, 2, 3, 64), 60_000.0).half()
    q = quantizer(bits=4)
    back = q.decode(q.encode(x, zero_mean(x)), zero_mean(x))
    assert float((back - x).square().mean().sqrt()) < 0.5 * 60_000


def test_codes_append_map_and_part() -> None:
    q, x = quantizer(), torch.randn(3, 2, 10, 64)
    whole = q.encode(x, zero_mean(x))
    first, rest = (q.encode(x[:, :, part], zero_mean(x)) for part in (slice(4), slice(4, None)))
    joined = first.append(rest)
    assert torch.equal(joined.rows, whole.rows)
    assert torch.equal(joined.gains, whole.gains)
    part = whole.part(slice(4, None))
    assert torch.equal(part.rows, rest.rows)
    assert part.gains.untyped_storage().data_ptr() == whole.gains.untyped_storage().data_ptr()
    turned = whole.map(lambda t: t.flip(0))
    assert torch.equal(q.decode(turned, zero_mean(x)), q.decode(whole, zero_mean(x)).flip(0))
    assert isinstance(turned, Codes)
