"""What a layer is coded with: statistics of short rows, budgets of keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant import NexusCache
from nexusquant.config import CompressionConfig
from nexusquant.plan import plan_coding
from tests.bench_cases import profiles_of

CHANNELS = torch.logspace(-1, 1, 16)


def tokens(count: int) -> Tensor:
    """(2, 2, count, 16): channels differ by a factor of 100 and have means far from zero."""
    return (torch.randn(2, 2, count, 16) + 3) * CHANNELS


def error_of_later_tokens(real: list[int], settings: CompressionConfig) -> list[float]:
    """Per row of a left-padded batch: error of later keys, relative, channel by channel."""
    count = max(real)
    keys, values, later = tokens(count), tokens(count), tokens(200)
    empty = torch.stack([torch.arange(count) < count - n for n in real])[:, None, :, None]
    coding = plan_coding(settings, keys.masked_fill(empty, 0), values, empty, None, 0)
    quantizer, centre = coding.tiers[0][0], coding.centres[0]
    none = torch.zeros(2, 1, 200, 1, dtype=torch.bool)
    error = quantizer.decode(*quantizer.encode(later, centre, none), centre) - later
    return (error / CHANNELS).square().mean((1, 2, 3)).tolist()


@pytest.mark.parametrize("short", [0, 1, 5, 40])
def test_a_short_row_is_coded_like_the_batch(short: int) -> None:
    settings = CompressionConfig(key_bits=3, value_bits=3, tiers=())
    long_error, short_error = error_of_later_tokens([300, short], settings)
    assert long_error < 0.07
    assert short_error < 1.5 * long_error


def test_rows_with_enough_tokens_do_not_depend_on_the_others() -> None:
    keys, values = tokens(32), tokens(32)
    none = torch.zeros(2, 1, 32, 1, dtype=torch.bool)
    settings = CompressionConfig()
    both = plan_coding(settings, keys, values, none, None, 0).centres[0]
    alone = plan_coding(settings, keys[1:], values[1:], none[1:], None, 0).centres[0]
    for name in ("mean", "scale"):
        torch.testing.assert_close(getattr(both, name)[1:], getattr(alone, name))


def test_a_chunk_of_padding_waits(model: LlamaForCausalLM) -> None:
    cache = NexusCache(model, "lossless")
    ids = torch.randint(2, 320, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(80) >= torch.tensor([[37], [39]])).long()
    model(ids[:, :40], attention_mask=mask[:, :40], cache=cache)
    assert not cache.stats().compressed_layers, "three tokens are no statistics"
    model(ids[:, 40:], attention_mask=mask, cache=cache)
    assert cache.stats().compressed_layers == 2


@pytest.mark.parametrize("with_profile", [True, False])
def test_unequal_bits_are_what_keys_and_values_get(
    model: LlamaForCausalLM, with_profile: bool
) -> None:
    profile = profiles_of(model).get() if with_profile else None
    settings = CompressionConfig(key_bits=3, value_bits=1, tiers=())
    none = torch.zeros(2, 1, 32, 1, dtype=torch.bool)
    rows = [
        plan_coding(settings, tokens(32), tokens(32), none, profile, layer).tiers[0]
        for layer in (0, 1)
    ]
    for side, bits in ((0, 3), (1, 1)):
        rates = [rate for row in rows for head in row[side].layout.rates for rate in head]
        assert sum(rates) / len(rates) == pytest.approx(bits, abs=0.2)
