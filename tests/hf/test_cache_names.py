"""The cache by either name, whatever the version of transformers and the model call it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

from nexusquant import CompressionConfig, NexusCache, UnsupportedError, nexusquant_evict
from nexusquant.hf import cache_names as names
from nexusquant.hf import transformers_private as private
from nexusquant.hf.coverage import cover
from nexusquant.versions import TRANSFORMERS
from tests.hf.models import prompt, tiny

NEWER = "99.1.0"
EXACT = CompressionConfig(codec="exact")
NAMES = pytest.mark.parametrize("name", names.CACHE_NAMES)


@pytest.fixture(autouse=True)
def unread() -> Any:
    """Whatever a test changes, the next one reads anew."""
    yield
    names._parameters.cache_clear()


@NAMES
def test_forward_and_generate_take_the_cache_by_either_name(name: str) -> None:
    model, ids = tiny(eos_token_id=95), prompt(100)
    stock = model.generate(ids, max_new_tokens=4, do_sample=False)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is dep", FutureWarning)  # from 5.24 on
        ours = model.generate(ids, **{name: NexusCache(model, EXACT)}, **settings)
        assert torch.equal(ours, stock)
        cache = NexusCache(model, EXACT)
        assert torch.equal(model.generate(ids, **{name: cache}, **settings), stock)
        assert cache.get_seq_length() == 103
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = NexusCache(model, EXACT)
        model(ids, **{name: cache})
        model.model(ids[:, :1], **{name: cache})
        assert cache.get_seq_length() == 101
    del cache
    assert not {private.VALIDATE, private.PREPARE_CACHE} & set(vars(model))
    assert not model.model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:`past_key_values` is dep:FutureWarning")
@NAMES
def test_prompt_lookup_takes_tokens_back(name: str) -> None:
    model, ids = tiny(eos_token_id=95), prompt(100).repeat(1, 2)
    settings = {"max_new_tokens": 12, "do_sample": False}
    stock = model.generate(ids, **settings)
    for codec in ("exact", "e8"):
        cache = NexusCache(model, "high", codec=codec)
        ours = model.generate(ids, **{name: cache}, prompt_lookup_num_tokens=3, **settings)
        assert cache.get_seq_length() == ours.shape[1] - 1
        assert codec == "e8" or torch.equal(ours, stock)


@NAMES
def test_a_block_takes_the_cache_by_either_name(name: str) -> None:
    model, ids = tiny(), prompt(100)
    with nexusquant_evict(model, quality="high") as run:
        cache = transformers.DynamicCache(config=model.config)
        model(ids, **{name: cache})
        assert run.stats.compressed_layers == 3


@NAMES
def test_a_name_without_a_cache_does_not_hide_the_other(name: str) -> None:
    model, ids = tiny(), prompt(60)
    cache = NexusCache(model, "high")
    (other,) = {*names.CACHE_NAMES} - {name}
    model(ids, **{name: cache, other: None})
    model.model(ids[:, :1], **{other: cache, name: cache})
    assert cache.get_seq_length() == 61
    with nexusquant_evict(model, "high") as run:
        model(ids, **{name: transformers.DynamicCache(config=model.config), other: None})
    assert run.stats.compressed_layers == 3


def test_two_caches_by_two_names_are_refused() -> None:
    model = tiny()
    first, second = NexusCache(model), NexusCache(model)
    with pytest.raises(UnsupportedError, match="two caches were given, as 'cache' and as 'past"):
        model(prompt(40), cache=first, past_key_values=second)
    assert not first.get_seq_length()


class HandsOn(LlamaForCausalLM):
    """As wrappers and remote code do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_forward_that_hands_on_what_it_gets() -> None:
    model, ids = HandsOn(tiny().config).eval(), prompt(60)
    cache = NexusCache(model, "high")
    model(ids, None, None, cache)
    assert cache.stats().compressed_layers == 3
    with nexusquant_evict(model, "high") as run:
        model.generate(ids, max_new_tokens=3)
    assert run.stats.compressed_layers == 3


@pytest.mark.parametrize(
    ("parameters", "name"),
    [("cache=None", "cache"), ("past_key_values=None", "past_key_values"), ("mems=None", None)],
)
def test_the_name_is_told_from_the_signature(parameters: str, name: str | None) -> None:
    made: dict[str, Any] = {}
    exec(f"def forward(self, input_ids=None, {parameters}, **kwargs): pass", made)
    kind = type("Model", (), {"forward": made["forward"]})
    assert names.cache_name(kind) == name
    assert bool(names.cache_obstacle(kind)) == (name is None)


def renamed_once_more(self: Any, input_ids: Any = None, kv_store: Any = None, **kwargs: Any) -> Any:
    raise AssertionError("is not run")


def test_an_argument_renamed_once_more_is_said_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers, "__version__", NEWER)
    model = tiny()
    monkeypatch.setattr(LlamaForCausalLM, "forward", renamed_once_more)
    for use in (NexusCache, lambda model: nexusquant_evict(model).__enter__()):
        with pytest.raises(UnsupportedError, match=f"{NEWER} has neither 'cache'") as said:
            use(model)
        assert "nothing to compress" not in str(said.value)
        assert f"tested with {TRANSFORMERS[0]} to {TRANSFORMERS[1]}" in str(said.value)
    assert "does not know" in cover(model.config).refused


def test_a_renamed_argument_is_seen_in_any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", renamed_once_more)
    with pytest.raises(UnsupportedError, match="by a name that nexusquant does not know"):
        NexusCache(tiny())


def test_a_model_without_a_cache_is_not_blamed_on_the_version() -> None:
    class Plain(PreTrainedModel):
        def forward(self, input_ids: Any = None) -> Any: ...

    assert names.cache_obstacle(Plain) == "keeps no key-value cache"
