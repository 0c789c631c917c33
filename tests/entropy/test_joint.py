"""All layers of a few tokens as one page: the numbers are those of single layers."""

from __future__ import annotations

import pytest
import torch

from nexusquant.entropy.joint import JointCode
from nexusquant.entropy.layer import LayerCode
from nexusquant.errors import FormatError, NonFiniteError, ProfileError
from tests.entropy.cases import LAYERS, page, profile

STEP = -30


@pytest.mark.parametrize("tokens", [1, 2, 32])
def test_vectors_are_those_of_single_layers(each_operator: str, tokens: int) -> None:
    keys, values = zip(*(page(tokens, seed) for seed in LAYERS), strict=True)
    code = JointCode(profile(), STEP)
    data = code.encode(keys, values)
    assert data == code.encode(keys, values)
    found = code.decode(data, tokens)
    single = 0
    for at, layer in enumerate(LAYERS):
        alone = LayerCode(profile(), layer, STEP)
        pages = alone.encode(keys[at], values[at], page=tokens)
        single += sum(map(len, pages))
        for x, y in zip(found, alone.decode(list(pages), [tokens]), strict=True):
            torch.testing.assert_close(x[at], y, rtol=0, atol=1e-5)
    assert len(data) <= single


def test_what_cannot_be_coded_is_refused() -> None:
    code, (keys, values) = JointCode(profile(), STEP), page(8)
    with pytest.raises(ProfileError, match="2 layers, the cache has 1"):
        code.encode([keys], [values])
    with pytest.raises(ProfileError, match="dimensions in layer 0"):
        code.encode([values, values], [values, values])
    with pytest.raises(NonFiniteError, match="layer 3"):
        code.encode([keys, keys], [values, values * torch.inf])


def test_damage_is_found_or_decodes_to_something() -> None:
    code, (keys, values) = JointCode(profile(), STEP), page(8)
    data = code.encode([keys] * 2, [values] * 2)
    with pytest.raises(FormatError, match="multiple of 4"):
        code.decode(data[:-1], 8)
    for at in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[at] ^= 64
        try:
            found = code.decode(bytes(damaged), 8)
        except FormatError:
            continue
        assert all(bool(x.isfinite().all()) for side in found for x in side)
