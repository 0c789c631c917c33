"""Our codes under presses, presses as scorers, and attention functions that kvpress replaces."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nexusquant import NexusCache, register_scorer
from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.hf.cache_names import given_cache
from nexusquant.kvpress import PressedCache, PressScorer
from nexusquant.scorers import ScoreInputs, get_scorer
from tests.kvpress_cases import EXACT, KeyNormPress, pressed, slots
from tests.tiny_checkpoint import tiny_model

pytestmark = pytest.mark.usefixtures("own_scorers")


# -- presses over our cache


def test_a_pressed_cache_is_what_the_press_left(model: LlamaForCausalLM, input_ids: Tensor) -> None:
    press, more = KeyNormPress(0.4), input_ids[:, :3]
    ours, cache = pressed(press, model, PressedCache(model, EXACT), input_ids, more)
    assert cache.get_seq_length() == 203
    assert cache.stats().kept_tokens == 123
    with torch.no_grad():  # the same tokens, by attention that cannot see the others
        whole = NexusCache(model, EXACT.replace(scorer="key_norm", evict_ratio=0.4))
        model(input_ids, cache=whole)
        assert all(slots(whole, i) == slots(cache, i) for i in range(2))
        torch.testing.assert_close(model(more, cache=whole).logits, ours)


def test_the_rest_is_coded_and_generation_goes_on(
    model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    press, cache = KeyNormPress(0.5), PressedCache(model, "high")
    with press(model):
        output = model.generate(
            input_ids, cache=cache, max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    assert output.shape == (1, 240)
    assert cache.stats().compressed_layers == 2
    assert cache.stats().kept_tokens == 100 + 39
    plain = NexusCache(model, "high")
    model.generate(input_ids, cache=plain, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert cache.nbytes < 0.8 * plain.nbytes


def test_half_precision_and_identical_tokens() -> None:
    model = tiny_model(320).to(torch.bfloat16)
    for rotary in model.modules():
        if hasattr(rotary, "inv_freq"):
            rotary.inv_freq.zero_()  # without positions, repeated tokens have the same keys
    ids = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9] * 12])
    with torch.no_grad():
        first = model.model.layers[0].self_attn
        first.v_proj.weight.zero_()
        _, cache = pressed(KeyNormPress(0.5), model, PressedCache(model, EXACT), ids, ids[:, :1])
    assert cache.stats().kept_tokens == 49


def test_without_a_press_it_is_a_cache_like_any_other(
    model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    for ratio in (0.0, 0.5):
        logits = []
        for kind in (PressedCache, NexusCache):
            cache = kind(model, "high", evict_ratio=ratio)
            with torch.no_grad():
                model(input_ids, cache=cache)
                logits.append(model(input_ids[:, :2], cache=cache).logits)
        assert torch.equal(*logits)


def test_presses_that_prune_nothing(model: LlamaForCausalLM, input_ids: Tensor) -> None:
    _, cache = pressed(KeyNormPress(0.0), model, PressedCache(model), input_ids, input_ids[:, :1])
    assert cache.stats().kept_tokens == 201


def test_masking_presses_prune_every_head_differently(
    model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    class Masking(KeyNormPress):
        def hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = given_cache(kwargs).layers[module.layer_idx]
            if layer.get_seq_length() == kwargs["hidden_states"].shape[1]:
                gone = torch.arange(10, 70)
                heads = torch.zeros(60, dtype=torch.int64)
                module.masked_key_indices = (torch.zeros_like(heads), heads, gone)
                layer.keys, layer.values = layer.keys, layer.values

    _, cache = pressed(Masking(0.0), model, PressedCache(model), input_ids, input_ids[:, :1])
    everything = set(range(200))
    assert slots(cache, 1) == [everything - set(range(10, 70)), everything]
    assert cache.layers[1].stored.sinks.slots.count == 4
    assert all(x.self_attn.masked_key_indices is None for x in model.model.layers)
    for layer in model.model.layers:
        del layer.self_attn.masked_key_indices


def test_presses_that_cannot_be_combined_with_codes(
    model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    def run(press: Any, ids: Tensor = input_ids, **kwargs: Any) -> None:
        cache = PressedCache(model)
        with torch.no_grad(), press(model):
            model(ids, cache=cache, **kwargs)

    with pytest.raises(UnsupportedError, match="not a choice of its tokens"):
        run(KeyNormPress(0.5, changes=True))
    with pytest.raises(UnsupportedError, match="it must be the same multiple of 2"):
        run(KeyNormPress(0.999))
    with pytest.raises(UnsupportedError, match="at least 32 tokens"):
        run(KeyNormPress(0.5), input_ids[:, :20])
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    with pytest.raises(UnsupportedError, match="padding"):
        run(KeyNormPress(0.5), input_ids[:, :60].expand(2, -1), attention_mask=mask)

    class Twice(KeyNormPress):
        def hook(self, *args: Any) -> None:
            super().hook(*args)
            super().hook(*args)

    with pytest.raises(UnsupportedError, match="prune once"):
        run(Twice(0.5))


# -- presses as scorers


def test_a_press_as_a_scorer(model: LlamaForCausalLM, input_ids: Tensor) -> None:
    register_scorer("press", PressScorer(KeyNormPress(0.5), model))
    stats = []
    for name in ("press", "key_norm"):
        cache = NexusCache(model, "max", scorer=name)
        with torch.no_grad():
            for start in (0, 100, 140):  # later passes, too
                model(input_ids[:, start : start + 100], cache=cache)
        stats.append([slots(cache, layer) for layer in range(2)])
    assert stats[0] == stats[1]


def test_hooks_leave_with_the_scorer(input_ids: Tensor) -> None:
    model = tiny_model(320)
    attention = model.model.layers[0].self_attn
    scorer = PressScorer(KeyNormPress(0.5), model)
    assert attention._forward_hooks
    del scorer
    gc.collect()
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


def test_what_presses_cannot_score(model: LlamaForCausalLM, input_ids: Tensor) -> None:
    with pytest.raises(ConfigError, match="method score"):
        PressScorer(KeyNormPress, model)
    with pytest.raises(ConfigError, match="PressedCache"):
        PressScorer(object(), model)
    with pytest.raises(UnsupportedError, match="transformers model"):
        PressScorer(KeyNormPress(0.5), nn.Linear(2, 2))

    class Window(KeyNormPress):
        def score(self, module: nn.Module, hidden_states: Tensor, *args: Any) -> Tensor:
            assert hidden_states.shape[1] > 64, "too short for the window"
            return super().score(module, hidden_states, *args)

    register_scorer("window", PressScorer(Window(0.5), model))
    keys = torch.randn(1, 2, 40, 16)
    with pytest.raises(UnsupportedError, match="bare tensors"):
        get_scorer("window").score(ScoreInputs(keys, keys, keys, None, 1.0))
    other, ids = tiny_model(320, seed=1), input_ids.repeat(2, 1)
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match="another model"):
            other(ids, cache=NexusCache(other, scorer="window"))
        with pytest.raises(UnsupportedError, match="too short for the window"):
            model(ids[:, :50], cache=NexusCache(model, scorer="window"))
        model(ids[:, :50], cache=NexusCache(model, scorer="window", residual_length=65))
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        with pytest.raises(UnsupportedError, match="padding"):
            model(ids, attention_mask=mask, cache=NexusCache(model, scorer="window"))


# -- kvpress's import


def patch_like_kvpress() -> None:
    """What `kvpress.attention_patch` does at import, as far as it concerns us."""

    def wrapped(function: Any) -> Any:
        def wrapper(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
            dropout: float, **kwargs: Any,
        ) -> Any:  # fmt: skip
            return function(module, query, key, value, attention_mask, dropout, **kwargs)

        return wrapper

    for name, function in ALL_ATTENTION_FUNCTIONS.items():
        ALL_ATTENTION_FUNCTIONS[name] = wrapped(function)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("when", ["before", "while", "between"])
def test_compression_goes_on_after_kvpress_was_imported(
    input_ids: Tensor, attention: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import puts functions of its own before those of transformers' registry."""
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", local)
    model = tiny_model(320)
    model.set_attn_implementation(attention)
    ids, mask = input_ids.repeat(2, 1), torch.ones(2, 200, dtype=torch.int64)
    mask[0, :9] = 0

    def read(cache: Any) -> Any:
        with torch.no_grad():
            for part in (slice(0, 150), slice(150, 200)):
                output = model(ids[:, part], cache=cache, attention_mask=mask[:, : part.stop])
        return output.logits

    plain, expected = read(DynamicCache(config=model.config)), NexusCache(model)
    logits, stats = read(expected), expected.stats()
    del expected
    gc.collect()
    for turn in range(3):
        if turn == 1 or (turn, when) == (0, "before"):
            patch_like_kvpress()
        cache = NexusCache(model)
        if (turn, when) == (0, "while"):
            patch_like_kvpress()
        assert torch.equal(read(cache), logits)
        assert cache.stats() == stats
        del cache
        gc.collect()
    assert torch.equal(read(DynamicCache(config=model.config)), plain)
