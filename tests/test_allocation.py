"""Uniform rates: the promised mean, the same for every head."""

from __future__ import annotations

import pytest

from nexusquant.allocation import uniform_layout
from nexusquant.errors import UnsupportedError


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("eighths", range(16, 33))
def test_mean_rate_is_as_close_as_groups_allow(heads: int, dim: int, eighths: int) -> None:
    bits, groups = eighths / 8, dim // 8
    layout = uniform_layout(heads, dim, bits)
    assert len(layout.rates) == heads
    assert len(set(layout.rates)) == 1
    rates = layout.rates[0]
    assert len(rates) == groups
    assert abs(sum(rates) / groups - bits) <= 0.5 / groups
    assert max(rates) - min(rates) <= 1
    assert layout.row_bytes == sum(rates)


def test_whole_rates_are_flat() -> None:
    for bits in (2, 3, 4):
        assert uniform_layout(2, 64, bits).rates == ((bits,) * 8,) * 2


def test_fractions_go_to_the_leading_groups() -> None:
    assert uniform_layout(1, 32, 2.25).rates == ((3, 2, 2, 2),)


@pytest.mark.parametrize("dim", [12, 4, 63])
def test_head_dims_without_whole_groups_are_refused(dim: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{dim} is not a multiple of 8"):
        uniform_layout(1, dim, 2)
