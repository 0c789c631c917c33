"""Token gains: one byte, 8 steps per octave, zero kept zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexusquant.math.gains import LIMIT, decode_gain, encode_gain

SMALLEST = 2.0**-15.875
HALF_STEP = 2 ** (1 / 16)


def test_every_code_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    gains = decode_gain(codes)
    assert gains.dtype == torch.float32
    assert torch.equal(encode_gain(gains), codes)
    assert (gains.diff() > 0).all()


def test_golden_codes() -> None:
    gains = torch.tensor([0.0, SMALLEST, 0.5, 1.0, 1.05, 3.0, LIMIT])
    assert encode_gain(gains).tolist() == [0, 1, 120, 128, 129, 141, 255]
    assert decode_gain(torch.tensor([0, 1, 120, 128, 136, 255])).tolist() == pytest.approx(
        [0.0, SMALLEST, 0.5, 1.0, 2.0, LIMIT]
    )


@given(st.floats(-15.875, 15.875))
def test_relative_error_is_at_most_half_a_step(octaves: float) -> None:
    rms = 2**octaves
    gain = float(decode_gain(encode_gain(torch.tensor([rms]))))
    assert 1 / HALF_STEP * (1 - 1e-5) <= gain / rms <= HALF_STEP * (1 + 1e-5)


def test_out_of_range() -> None:
    assert encode_gain(torch.tensor([1e-30, 1e-6, 2.0**-16.1])).tolist() == [0, 0, 0]
    assert encode_gain(torch.tensor([1e9, 1e38])).tolist() == [255, 255]
