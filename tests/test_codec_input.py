"""`NexusQuantSimple` refuses what it cannot encode, and says what was wrong."""

from __future__ import annotations

import pytest
import torch

from nexusquant import NexusQuantSimple
from nexusquant.errors import ConfigError, NonFiniteError, UnsupportedError
from tests.test_codec import random_kv

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((2, 3, 10, 64), (2, 3, 11, 64), "(2, 3, 11, 64)"),
        ((2, 3, 10, 64), (2, 4, 10, 64), "equal batch"),
        ((3, 10, 64), (3, 10, 64), "(3, 10, 64)"),
        ((2, 3, 10, 64), (2, 3, 10), "must be (batch"),
        ((2, 3, 0, 64), (2, 3, 0, 64), "nothing to encode"),
        ((0, 3, 10, 64), (0, 3, 10, 64), "nothing to encode"),
        ((2, 3, 10, 64), (2, 3, 10, 0), "nothing to encode"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(
    keys: tuple[int, ...], values: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        NexusQuantSimple().encode(torch.randn(keys), torch.randn(values))
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", [0, 1])
def test_only_floating_point_is_accepted(dtype: torch.dtype, which: int) -> None:
    tensors = list(random_kv(tokens=10))
    tensors[which] = tensors[which].to(dtype)
    with pytest.raises(ConfigError, match=str(dtype)):
        NexusQuantSimple().encode(*tensors)


def test_queries_that_do_not_fit() -> None:
    keys, values = random_kv(tokens=60)
    with pytest.raises(ConfigError, match="query heads a multiple of KV heads"):
        NexusQuantSimple("balanced").encode(keys, values, torch.randn(2, 4, 60, 64))


@pytest.mark.parametrize(("dim", "value_dim"), [(12, 64), (64, 12), (4, 4)])
def test_head_dims_that_are_no_multiple_of_8(dim: int, value_dim: int) -> None:
    keys, values = random_kv(dim=dim, value_dim=value_dim)
    with pytest.raises(UnsupportedError, match="not a multiple of 8"):
        NexusQuantSimple().encode(keys, values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("token", [0, 100])
def test_bad_numbers(bad: float, which: int, token: int) -> None:
    tensors = random_kv()
    tensors[which][1, 2, token] = bad
    if token == 0 and bad == 1e30:  # an uncoded sink keeps any finite number
        codec = NexusQuantSimple()
        assert float(codec.decode(codec.encode(*tensors))[which][1, 2, 0, 5]) == pytest.approx(bad)
        return
    with pytest.raises(NonFiniteError, match="layer 0, tokens 0 to 199"):
        NexusQuantSimple().encode(*tensors)


def test_unknown_quality_and_setting() -> None:
    with pytest.raises(ConfigError, match="'best'; known presets: lossless"):
        NexusQuantSimple("best")
    with pytest.raises(ConfigError, match="unknown setting bits"):
        NexusQuantSimple(bits=3)
