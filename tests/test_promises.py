"""What the original system promised, as its users would write it, in CPU form."""

from __future__ import annotations

import pytest
import torch

from nexusquant import PRESETS, NexusCache, NexusQuantSimple, evaluate, nexusquant_evict
from nexusquant.accounting import storage_bytes
from nexusquant.math.e8 import HEADROOM
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

VOCABULARY = ("lossless", "conservative", "high", "balanced", "aggressive", "max")
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def input_ids(tokenizer):
    ids = tokenizer(TEXT * 30, return_tensors="pt").input_ids[:, :400]
    assert ids.shape[1] == 400
    return ids


@pytest.mark.parametrize("quality", VOCABULARY)
def test_one_liner(model, input_ids, quality):
    hooks = len(model._forward_pre_hooks)
    with nexusquant_evict(model, quality=quality) as run:
        output = model.generate(input_ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
    assert output.shape[1] > input_ids.shape[1]
    assert len(model._forward_pre_hooks) == hooks, "hooks are restored on exit"
    assert run.stats.compression_ratio > (2.5 if quality == "lossless" else 3)


def test_the_ratio_counts_eviction_and_both_vocabularies_agree(model, input_ids):
    ratios = {}
    for quality in VOCABULARY:
        cache = NexusCache(model, quality)
        model(input_ids, cache=cache)
        ratios[quality] = cache.compression_ratio
    assert ratios["conservative"] == ratios["high"]
    assert ratios["aggressive"] == ratios["max"]
    assert ratios["lossless"] < ratios["high"] < ratios["balanced"] < ratios["max"]


def test_half_and_single_precision_models_are_both_served(tokenizer, input_ids):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model(len(tokenizer)).to(dtype)
        with nexusquant_evict(model, quality="balanced") as run:
            model(input_ids)
        assert run.stats.compressed_layers == 2


def test_domain_test_script_sees_real_and_different_numbers(model, input_ids):
    losses = {}
    for quality in ("lossless", "conservative", "balanced", "aggressive"):
        with nexusquant_evict(model, quality=quality):
            losses[quality] = model(input_ids, labels=input_ids).loss.item()
    plain = model(input_ids, labels=input_ids).loss.item()
    assert len(set(losses.values()) | {plain}) == 5, "every preset has its own loss"


def test_domain_test_function(model, tokenizer):
    rows = evaluate.domain_test(model, tokenizer, [TEXT * 8, TEXT * 12, "too short"])
    assert [row.preset for row in rows] == ["lossless", "high", "balanced", "max"]
    assert {row.texts for row in rows} == {2}
    assert rows[0].perplexity_change == 0
    assert len({row.loss for row in rows}) == 4
    assert [row.ratio for row in rows] == sorted(row.ratio for row in rows)


def test_memory_measurement_agrees_with_the_reported_ratio(model, input_ids):
    for quality in ("lossless", "balanced", "max"):
        memory = evaluate.memory(model, input_ids, quality)
        assert memory.compressed == pytest.approx(memory.stats.nbytes, rel=0.01)
        assert memory.measured_ratio == pytest.approx(memory.stats.compression_ratio, rel=0.01)
        assert memory.plain == memory.stats.elements * 4, "the plain cache is fp32 here"


def test_low_level_codec_is_right_for_batches():
    keys, values = torch.randn(5, 2, 300, 64), torch.randn(5, 2, 300, 64)
    codec = NexusQuantSimple("lossless")
    packed = codec.encode(keys, values)
    assert packed.nbytes == storage_bytes(packed)
    decoded = codec.decode(packed)
    for row in range(5):
        alone = codec.decode(codec.encode(keys[row : row + 1], values[row : row + 1]))
        for whole, single in zip(decoded, alone, strict=True):
            assert torch.allclose(whole[row : row + 1], single, atol=1e-5)


@pytest.mark.parametrize(
    ("quality", "ratio"), [("lossless", 6.5), ("high", 10), ("balanced", 16), ("max", 32)]
)
def test_preset_ratios_at_1536_tokens(quality, ratio):
    keys, values = torch.randn(1, 2, 1536, 64), torch.randn(1, 2, 1536, 64)
    assert NexusQuantSimple(quality).encode(keys, values).compression_ratio >= ratio


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.9), (3, 0.9), (4, 0.98)])
def test_presets_clip_outliers_less_than_gaussian_optimal_levels(bits, bound):
    """Coordinates of real caches have heavy tails; Laplace stands in for them (docs/results)."""
    uniform = torch.rand(1, 1, 4000, 64) - 0.5
    keys = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    outliers = keys.abs() > 5 * keys.std()
    error = {}
    for name, overload in (("preset", 1.0), ("optimal", 1 / HEADROOM[bits])):
        settings = {"key_bits": bits, "transform": "identity", "tiers": ()}
        codec = NexusQuantSimple("lossless", **settings, overload=overload)
        decoded = codec.decode(codec.encode(keys, keys))[0]
        error[name] = (decoded - keys)[outliers].square().mean().item()
    assert {config.overload for config in PRESETS.values()} == {1.0}
    assert error["preset"] < bound * error["optimal"]
