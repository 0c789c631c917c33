"""Bad input raises with a reason; what cannot be compressed stays exact and says so once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from nexusquant import (
    ConfigError,
    NexusCache,
    NonFiniteError,
    UnsupportedError,
    nexusquant_evict,
)
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import NexusQuantWarning
from tests.hf.models import assert_same_run, generate, prompt, tiny
from tests.hf.situation_cases import EXACT

SMALL = {"vocab_size": 96, "d_model": 32, "num_layers": 1}


def compact(cache: Any) -> bool:
    return any(isinstance(layer, CompactLayer) for layer in cache.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quality": "ultra"}, "known presets: lossless, high"),
        ({"bits": 2}, "unknown setting bits; known: allocation, codec"),
        ({"evict_ratio": 1.5}, "evict_ratio=1.5: must be in"),
        ({"scorer": "oracle"}, "scorer='oracle': must be one of"),
    ],
)
def test_bad_settings_raise_before_the_model_is_touched(
    arguments: dict[str, Any], message: str
) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=message), nexusquant_evict(model, **arguments):
        pass
    with pytest.raises(ConfigError, match=message):
        NexusCache(model, **arguments)
    assert not model._forward_pre_hooks


def encoder_decoders() -> list[Any]:
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    bart = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return [T5ForConditionalGeneration(t5), BartForConditionalGeneration(bart)]


def flex() -> Any:
    model = tiny()
    model.config._attn_implementation_internal = "flex_attention"
    return model


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: encoder_decoders()[0], "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: encoder_decoders()[1], "BartForConditionalGeneration is an encoder-decoder"),
        (flex, "'flex_attention' is not supported; load the model with 'sdpa'"),
        (mamba, "MambaForCausalLM has no attention layers"),
        (lambda: torch.nn.Linear(2, 2), "expected a transformers model, got Linear"),
    ],
    ids=["t5", "bart", "flex", "mamba", "not_transformers"],
)
def test_models_that_cannot_have_a_compressed_cache(build: Any, message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedError, match=message), nexusquant_evict(model):
        pass
    with pytest.raises(UnsupportedError, match=message):
        NexusCache(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["k_proj", "v_proj"])
@pytest.mark.parametrize("tokens", [3, 60], ids=["sinks", "body"])
def test_non_finite_weights_name_the_layer(bad: float, weight: str, tokens: int) -> None:
    model = tiny()
    getattr(model.model.layers[1].self_attn, weight).weight.data[3] = bad
    with (
        pytest.raises(NonFiniteError, match=f"layer 1, tokens 0 to {tokens - 1}"),
        nexusquant_evict(model, residual_length=2, recent=2),
    ):
        generate(model, prompt(tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_head_dim_12_stays_exact_with_one_warning(attention: str) -> None:
    model = tiny("llama", attention, head_dim=12)
    stock = generate(model, prompt(60))
    with warnings.catch_warnings(record=True) as caught, nexusquant_evict(model) as run:
        warnings.simplefilter("always")
        generate(model, prompt(60))
        ours = generate(model, prompt(60))
    assert [str(w.message) for w in caught if w.category is NexusQuantWarning] == [
        "head_dim [12] is not a multiple of 8: such layers stay exact."
    ]
    assert_same_run(ours, stock)
    assert (run.stats.compressed_layers, run.stats.exact_layers) == (0, 3)
    # fp32, one token short of the sequence: the last one was never fed
    assert run.stats.nbytes == 3 * 2 * 2 * 12 * 71 * 4


def test_head_dim_12_can_still_be_evicted_exactly() -> None:
    model = tiny(head_dim=12)
    with nexusquant_evict(model, EXACT.replace(evict_ratio=0.5, recent=4)) as run:
        generate(model, prompt(60), 1)
    assert run.stats.kept_tokens == 30


def test_static_cache_is_left_alone_with_one_warning() -> None:
    model = tiny()
    stock = generate(model, prompt(40))
    with (
        pytest.warns(NexusQuantWarning, match="StaticCache is left uncompressed") as caught,
        nexusquant_evict(model),
    ):
        ours = generate(model, prompt(40), cache_implementation="static")
    assert len(caught) == 1
    assert type(ours.cache) is StaticCache
    assert_same_run(ours, stock)


def test_offloaded_cache_is_left_alone_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    # Offloading itself wants a second device; what counts here is that nobody swaps the layers.
    monkeypatch.setattr(cache, "update", lambda keys, values, *_, **__: (keys, values))
    layers = list(cache.layers)
    with torch.no_grad(), nexusquant_evict(model):
        with pytest.warns(NexusQuantWarning, match="offloaded cache is left uncompressed"):
            model(prompt(40), cache=cache)
        model(prompt(40), cache=cache)  # a second warning would be an error
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))


def test_filled_cache_is_left_alone_with_one_warning() -> None:
    model = tiny()
    stock = generate(model, prompt(40))
    ids = torch.cat([stock.sequences, prompt(9)], 1)
    with (
        pytest.warns(NexusQuantWarning, match="already holds tokens") as caught,
        nexusquant_evict(model),
    ):
        ours = generate(model, ids, cache=stock.cache)
    assert len(caught) == 1
    assert not compact(ours.cache)
    assert_same_run(ours, generate(model, ids))


def test_no_cache_wanted_means_no_cache() -> None:
    model = tiny()
    with torch.no_grad(), nexusquant_evict(model):
        out = model(prompt(40), use_cache=False)
        stock = generate(model, prompt(40), use_cache=False)
    assert out.cache is None
    assert_same_run(stock, generate(model, prompt(40)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_inside_the_block_is_exact_with_one_warning(attention: str) -> None:
    model = tiny("llama", attention)
    model.train()
    ids = prompt(60)
    model(ids, labels=ids).loss.backward()
    stock = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with nexusquant_evict(model, "max"):
        with pytest.warns(NexusQuantWarning, match="training"):
            model(ids)
        model(ids, labels=ids).loss.backward()  # a second warning would be an error
    for ours, gradient in zip(model.parameters(), stock, strict=True):
        assert torch.equal(ours.grad, gradient)


def test_training_through_a_compressed_cache_is_refused() -> None:
    model = tiny()
    model.train()
    with pytest.raises(UnsupportedError, match="no gradient"):
        model(prompt(60), cache=NexusCache(model))


@torch.no_grad()
def test_output_attentions_from_the_start_keeps_the_cache_exact_with_one_warning() -> None:
    model = tiny("llama", "eager")
    cache = NexusCache(model, residual_length=8)
    stock = DynamicCache(config=model.config)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for tokens in (40, 2, 30):
            mine, theirs = (
                model(prompt(tokens), cache=c, output_attentions=True) for c in (cache, stock)
            )
            assert torch.equal(mine.attentions[0], theirs.attentions[0])
            assert torch.equal(mine.logits, theirs.logits)
    (only,) = given
    assert only.category is NexusQuantWarning
    assert "output_attentions" in str(only.message)
    assert not cache.stats().compressed_layers


@torch.no_grad()
def test_output_attentions_over_codes_is_refused() -> None:
    model = tiny("llama", "eager")
    cache = NexusCache(model, residual_length=8)
    model(prompt(40), cache=cache)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(prompt(2), cache=cache, output_attentions=True)


def test_reading_evicted_keys_is_refused_and_coded_ones_are_decoded() -> None:
    model = tiny()
    full = NexusCache(model, "lossless", tiers=(), key_bits=2.2, value_bits=2.2)
    evicted = NexusCache(model, "max", evict_ratio=0.4)
    with torch.no_grad():
        for cache in (full, evicted):
            model(prompt(60), cache=cache)
        stock = model(prompt(60)).cache.layers[0]
    keys = full.layers[0].keys
    assert keys.shape == stock.keys.shape
    error = (keys + 0 - stock.keys).square().mean() / stock.keys.var()
    assert error < 0.12
    with pytest.raises(UnsupportedError, match="evicted or padded"):
        evicted.layers[0].keys + 0


@torch.no_grad()
def test_stats_of_a_cache_that_was_left_alone() -> None:
    model = tiny()
    cache = DynamicCache(config=model.config)
    model(prompt(40), cache=cache)
    with nexusquant_evict(model) as run, pytest.warns(NexusQuantWarning, match="already holds"):
        model(prompt(5), cache=cache)
    assert run.stats.tokens == 45
    assert run.stats.compressed_layers == 0
    assert run.stats.compression_ratio == 0.5, "fp32 against fp16"


@torch.no_grad()
def test_another_batch_size_is_refused() -> None:
    model = tiny()
    cache = NexusCache(model)
    model(prompt(40, batch=2), cache=cache)
    with pytest.raises(UnsupportedError, match=r"\(2, 2\) but was given \(3, 2\)"):
        model(prompt(5, batch=3), cache=cache)
    assert cache.get_seq_length() == 40


def test_gradients_are_right_or_refused() -> None:
    model = tiny()
    embedded = model.get_input_embeddings()(prompt(60)).detach().requires_grad_()

    def gradient(cache: Any) -> torch.Tensor:
        logits = model(inputs_embeds=embedded, cache=cache).logits
        return torch.autograd.grad(logits.sum(), embedded)[0]

    cache = NexusCache(model, "max")
    stock = gradient(DynamicCache(config=model.config))
    torch.testing.assert_close(gradient(cache), stock, rtol=1e-4, atol=1e-5)
    assert all(not x.requires_grad for x in (cache.layers[0].tail.keys,))
    with pytest.raises(UnsupportedError, match="no gradient flows into the past"):
        gradient(cache)
