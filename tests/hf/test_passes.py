"""A forward pass that fails half way leaves the cache as it was."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StableLmConfig, StableLmForCausalLM

from nexusquant import ConfigError, NexusCache, NonFiniteError, UnsupportedError, nexusquant_evict
from nexusquant.scorers import SCORERS
from tests.hf.models import prompt, tiny

SETTINGS: dict[str, Any] = {"quality": "high", "residual_length": 8, "recent": 4}


class Failing:
    """Raises at the `at`-th layer's MLP, where earlier layers have taken up the new tokens."""

    def __init__(self, model: nn.Module, error: BaseException, at: int = 1) -> None:
        self.error = error
        layer = model.model.layers[at]
        self.handle = layer.register_forward_pre_hook(self._raise)

    def _raise(self, *_: Any) -> None:
        raise self.error


def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, cache=cache).logits


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_failed_pass_is_undone(name: str, first: int, error: BaseException) -> None:
    model = tiny(name)
    ids = prompt(80)
    caches = [NexusCache(model, **SETTINGS) for _ in range(2)]
    for cache in caches:
        if first:
            logits(model, cache, ids[:, :first])
    failing = Failing(model, error)
    with pytest.raises(type(error)):
        logits(model, caches[0], ids[:, first:60])
    failing.handle.remove()
    for cache in caches:  # also the first pass after a KeyboardInterrupt starts from a clean cache
        cache.result = logits(model, cache, ids[:, first:60])
    assert torch.equal(caches[0].result, caches[1].result)
    assert caches[0].get_seq_length() == 60
    assert caches[0].nbytes == caches[1].nbytes
    assert torch.equal(*(logits(model, cache, ids[:, 60:]) for cache in caches))


def stablelm() -> Any:
    """Gets as far as its attention function without a token; other models fail before."""
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return StableLmForCausalLM(StableLmConfig(**shape, **heads)).eval()


@pytest.mark.parametrize("build", [tiny, stablelm])
def test_a_pass_over_no_tokens_is_refused(build: Any) -> None:
    """By the model or by us, and nothing changes."""
    model, ids = build(), prompt(80)
    caches = [NexusCache(model, **SETTINGS) for _ in range(2)]
    for part in (ids[:, :60], ids[:, 60:]):
        for use in (caches[0], None):
            error = pytest.raises((RuntimeError, UnsupportedError), match=r"0 elements|no tokens")
            with error, nexusquant_evict(model, **SETTINGS):
                logits(model, use, ids[:, :0])
        assert torch.equal(*(logits(model, cache, part) for cache in caches))


def test_a_refused_pass_is_undone() -> None:
    model = tiny("llama")
    cache = NexusCache(model, **SETTINGS)
    logits(model, cache, prompt(40))
    before = cache.nbytes
    bad = model.get_input_embeddings()(prompt(20)).detach().clone()
    bad[0, 3] = torch.nan
    with torch.no_grad(), pytest.raises(NonFiniteError, match="layer 0"):
        model(inputs_embeds=bad, cache=cache)
    assert cache.get_seq_length() == 40
    assert cache.nbytes == before


@pytest.mark.parametrize("evict_ratio", [0.0, 0.5])
@pytest.mark.parametrize(
    ("scores", "error"),
    [
        (torch.zeros(2, 3), ConfigError),
        (None, ConfigError),
        (torch.full((1, 2, 20), torch.nan), NonFiniteError),
    ],
)
def test_a_pass_with_bad_scores_is_undone(
    scores: Any, error: type[Exception], evict_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without eviction they still decide on tiers."""
    model, ids = tiny("llama"), prompt(60)
    caches = [
        NexusCache(model, **SETTINGS, evict_ratio=evict_ratio, scorer="key_norm") for _ in range(2)
    ]
    for cache in caches:
        logits(model, cache, ids[:, :40])
    with monkeypatch.context() as patch:
        patch.setitem(SCORERS, "key_norm", SimpleNamespace(score=lambda _: scores))
        with pytest.raises(error, match="scorer 'key_norm'"):
            logits(model, caches[0], ids[:, 40:])
    assert torch.equal(*(logits(model, cache, ids[:, 40:]) for cache in caches))
    assert caches[0].nbytes == caches[1].nbytes


def test_a_pass_keeps_nothing_alive() -> None:
    model = tiny("llama")
    cache = NexusCache(model, **SETTINGS)
    logits(model, cache, prompt(40))
    layer = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert layer() is None
