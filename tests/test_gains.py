"""Token gains: sixteen codes, rounded on the logarithmic scale, pinned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexusquant.math.gains import LIMIT, decode_gain, encode_gain

# log2 of the gains: part of the byte format.
OCTAVES = [
    *(-2, -5 / 3, -4 / 3, -1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3),
    *(2.25, 3, 4.25, 6.5),
]
CODES = torch.arange(16, dtype=torch.uint8)


def test_golden_gains() -> None:
    gains = decode_gain(CODES)
    assert gains.dtype == torch.float32
    assert gains.tolist() == pytest.approx([2.0**octave for octave in OCTAVES], rel=1e-6)


def test_every_code_comes_back() -> None:
    codes = encode_gain(decode_gain(CODES))
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, CODES)


@given(st.floats(-20, math.log2(LIMIT)))
def test_the_nearest_gain_in_octaves_is_taken(octaves: float) -> None:
    code = int(encode_gain(torch.tensor([2.0**octaves])))
    distance = [abs(octaves - other) for other in OCTAVES]
    assert distance[code] <= min(distance) + 1e-6


@given(st.floats(0, 2**7), st.floats(0, 2**7))
def test_a_larger_vector_never_has_a_smaller_gain(a: float, b: float) -> None:
    small, large = encode_gain(torch.tensor(sorted((a, b)))).tolist()
    assert 0 <= small <= large <= 15


@pytest.mark.parametrize("code", range(15))
def test_codes_change_half_way_between_neighbours(code: int) -> None:
    middle = 2.0 ** ((OCTAVES[code] + OCTAVES[code + 1]) / 2)
    around = torch.tensor([middle * (1 - 1e-5), middle * (1 + 1e-5)])
    assert encode_gain(around).tolist() == [code, code + 1]


def test_common_sizes_lie_within_a_sixth_of_an_octave_and_the_limit_within_one() -> None:
    steps = [b - a for a, b in itertools.pairwise(OCTAVES)]
    assert max(steps[:11]) == pytest.approx(1 / 3)
    assert math.log2(LIMIT) - OCTAVES[-1] <= 0.5
    assert encode_gain(torch.tensor([LIMIT])).tolist() == [15]


def test_what_is_smaller_than_the_smallest_gain_takes_it() -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert encode_gain(torch.tensor([0.0, tiny, 1e-30, 1e-6, 0.25])).tolist() == [0] * 5


def test_any_shape() -> None:
    rms = torch.rand(2, 3, 5) * 4
    codes = encode_gain(rms)
    assert codes.shape == decode_gain(codes).shape == rms.shape
    flat = [int(encode_gain(x.view(1))) for x in rms.flatten()]
    assert codes.flatten().tolist() == flat
    assert encode_gain(rms[:, :0]).shape == decode_gain(codes[:, :0]).shape == (2, 0, 5)
