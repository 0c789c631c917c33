"""Measurements: against direct computation, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from nexusquant import ConfigError, NexusCache, evaluate


def test_the_exact_codec_does_not_diverge(model, input_ids):
    result = evaluate.divergence(model, input_ids, 150, "lossless", codec="exact")
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.loss == pytest.approx(result.full_loss, abs=1e-5)
    assert result.top1 == 1


def test_full_loss_is_the_models_own(model, input_ids):
    labels = input_ids.clone()
    labels[:, :151] = -100
    with torch.no_grad():
        expected = model(input_ids, labels=labels).loss.item()
    result = evaluate.divergence(model, input_ids, 150, "max")
    assert result.full_loss == pytest.approx(expected, abs=1e-4)
    assert result.kl > 0
    assert result.perplexity_change == pytest.approx(
        math.exp(result.loss) / math.exp(result.full_loss) - 1
    )


def test_fewer_bits_and_more_eviction_diverge_more(model, input_ids):
    good = evaluate.divergence(model, input_ids, 150, "lossless", key_bits=4, value_bits=4)
    poor = evaluate.divergence(model, input_ids, 150, "max")
    assert good.kl < poor.kl
    assert good.stats.compression_ratio < poor.stats.compression_ratio


def test_tokens_are_decoded_one_by_one(model, input_ids):
    """Against a loop by hand; what is decoded is compressed and counted."""
    cache, plain = NexusCache(model, "high"), DynamicCache(config=model.config)
    divergences = []
    with torch.no_grad():
        for piece in (input_ids[:, :100], *input_ids[:, 100:].split(1, dim=1)):
            both = [model(piece, cache=each, use_cache=True).logits[0] for each in (plain, cache)]
            full, ours = (torch.log_softmax(logits, -1) for logits in both)
            divergences.append((full.exp() * (full - ours)).sum(-1))
    expected = torch.cat(divergences[1:])
    result = evaluate.divergence(model, input_ids, 100, "high")
    assert result.kl == pytest.approx(expected.mean().item(), rel=1e-3)
    assert result.p999 == pytest.approx(expected.quantile(0.999).item(), rel=1e-3)
    assert result.final == cache.stats()
    assert result.stats.tokens == 100
    quick = evaluate.divergence(model, input_ids, 100, "high", step=100)
    assert quick.kl < result.kl, "scored tokens see each other uncoded"
    with pytest.raises(ConfigError, match="step=0: must be at least 1"):
        evaluate.divergence(model, input_ids, 100, "high", step=0)


@pytest.mark.parametrize("prefix", [0, 199, 500])
def test_nothing_to_score_is_refused(model, input_ids, prefix):
    with pytest.raises(ConfigError, match="behind the prefix"):
        evaluate.divergence(model, input_ids, prefix)


def test_batches_are_refused(model, input_ids):
    with pytest.raises(ConfigError, match="one row"):
        evaluate.divergence(model, input_ids.repeat(2, 1), 100)


def test_texts_that_are_all_too_short_are_refused(model):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return type("Encoding", (), {"input_ids": torch.full((1, len(text)), 5)})

    with pytest.raises(ConfigError, match="none of the 2 texts"):
        evaluate.domain_test(model, Tokenizer(), ["short", "also short"])


def test_decoding_measures_the_tail(model, input_ids):
    plain = evaluate.decoding(model, input_ids, 190, None)
    ours = evaluate.decoding(model, input_ids, 190, "balanced")
    assert plain.after_steps.compression_ratio == 0.5
    assert ours.after_prefill.tokens == 190
    assert ours.after_steps.tokens == 200
    assert ours.after_prefill.compression_ratio > ours.after_steps.compression_ratio
    assert ours.prefill_seconds > 0
    assert ours.step_seconds > 0
    with pytest.raises(ConfigError, match="at least 1 tokens behind"):
        evaluate.decoding(model, input_ids, 200, None)
