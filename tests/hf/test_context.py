"""`nexusquant_evict` leaves a model exactly as it found it, whatever happens inside."""

from __future__ import annotations

import contextvars
import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nexusquant import NexusCache, NexusQuantError, nexusquant_evict
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.profiles import remember_profile
from tests.hf.models import assert_same_run, generate, prompt, tiny
from tests.hf.situation_cases import EXACT, HALF
from tests.hf.state import State


def test_fifty_rounds(model: Any) -> None:
    for _ in range(50):
        with nexusquant_evict(model):
            pass
    with nexusquant_evict(model) as run:
        generate(model, prompt(80))
    assert run.stats.compressed_layers == 3


def test_an_exception_in_the_block(model: Any) -> None:
    def fail() -> None:
        with nexusquant_evict(model):
            generate(model, prompt(40), 2)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_an_exception_in_the_middle_of_a_forward_pass(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in layer 1")

    with nexusquant_evict(model, HALF) as run:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        for call in ({}, {"labels": prompt(80)}):
            with pytest.raises(ArithmeticError, match="layer 1"), torch.no_grad():
                model(prompt(80), **call)
        handle.remove()
        out = generate(model, prompt(60))  # the block goes on working
    assert run.stats.tokens == 60 + 11
    assert all(isinstance(layer, CompactLayer) for layer in out.cache.layers)


def test_the_innermost_block_counts(model: Any) -> None:
    with nexusquant_evict(model, EXACT) as outer:
        generate(model, prompt(60), 2)
        with nexusquant_evict(model, HALF) as inner:
            generate(model, prompt(70), 2)
        assert inner.stats.kept_tokens == 36
        generate(model, prompt(80), 2)
    assert (outer.stats.tokens, outer.stats.kept_tokens) == (81, 81)
    assert inner.stats.tokens == 71


def test_blocks_may_end_in_any_order(model: Any) -> None:
    first, second = nexusquant_evict(model, EXACT), nexusquant_evict(model, HALF)
    one = first.__enter__()
    two = second.__enter__()
    first.__exit__(None, None, None)
    generate(model, prompt(60), 1)
    assert two.stats.kept_tokens == 30
    second.__exit__(None, None, None)
    with pytest.raises(NexusQuantError, match="no cache was used"):
        _ = one.stats


def test_an_abandoned_generator_leaves_nothing(model: Any) -> None:
    def tokens() -> Iterator[int]:
        with nexusquant_evict(model, HALF):
            while True:
                yield int(generate(model, prompt(40), 1).sequences[0, -1])

    def abandon() -> None:
        source = tokens()
        next(source)
        next(source)

    contextvars.copy_context().run(abandon)
    gc.collect()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(40), cache=cache)
    assert not any(isinstance(layer, CompactLayer) for layer in cache.layers)


def test_another_model_is_untouched(model: Any) -> None:
    other = tiny("gemma3", model.config._attn_implementation, seed=3)
    state = State(other)
    stock = generate(other, prompt(50))
    with nexusquant_evict(model, HALF), nexusquant_evict(tiny("qwen2"), HALF):
        assert other.config._attn_implementation == state.attention
        assert not other._forward_pre_hooks
        ours = generate(other, prompt(50))
    assert all(not isinstance(layer, CompactLayer) for layer in ours.cache.layers)
    assert_same_run(ours, stock, 0)
    state.assert_restored()


def test_a_copy_made_inside_works_without_us(model: Any) -> None:
    stock = generate(model, prompt(50))
    with nexusquant_evict(model, HALF):
        generate(model, prompt(50), 2)
        twin = copy.deepcopy(model)
        inside = generate(twin, prompt(50))
    assert not any(isinstance(layer, CompactLayer) for layer in inside.cache.layers)
    assert twin.config._attn_implementation == model.config._attn_implementation
    for ours in (inside, generate(twin, prompt(50))):
        assert_same_run(ours, stock, 0)
    with nexusquant_evict(twin, HALF) as run:
        generate(twin, prompt(60), 1)
    assert run.stats.kept_tokens == 30


def test_a_model_saved_inside_is_free_of_us(model: Any, tmp_path: Path) -> None:
    with nexusquant_evict(model, HALF):
        model.save_pretrained(tmp_path / "inside")
        torch.save(model, tmp_path / "whole.pt")
    model.save_pretrained(tmp_path / "outside")
    texts = [(tmp_path / where / "config.json").read_text() for where in ("inside", "outside")]
    assert texts[0] == texts[1]
    assert "nexusquant" not in json.dumps(json.loads(texts[0]))
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_same_run(generate(loaded, prompt(30)), generate(model, prompt(30)), 0)


def test_stats_after_the_block_are_those_of_the_last_cache(model: Any) -> None:
    with nexusquant_evict(model, "max") as run:
        with pytest.raises(NexusQuantError, match="no cache was used"):
            _ = run.stats
        generate(model, prompt(300), 2)
        inside = run.stats
    assert run.stats == inside
    assert run.stats.tokens == 301
    assert run.stats.compression_ratio > 4
    assert "compressed" in str(run.stats)


def test_the_profile_in_use(model: Any) -> None:
    filled = generate(model, prompt(40), 2).cache
    with nexusquant_evict(model) as run:
        assert run.profile is None
        generate(model, prompt(60), 2)
        assert run.profile is None, "too short to build one"
        generate(model, prompt(460), 1)
        built = run.profile
    assert run.profile is built is not None
    remember_profile(model, built)
    with nexusquant_evict(model, "max") as run:
        assert run.profile is built, "found"
        own = NexusCache(model, rope_page=0)
        generate(model, prompt(460), 1, cache=own)
        assert run.profile is own.profile is not None is not built
        generate(model, prompt(60), 2)
        assert run.profile is built
        with pytest.warns(UserWarning, match="left uncompressed"):
            generate(model, prompt(60), 2, cache=filled)
        assert run.profile is None
    with nexusquant_evict(model, transform="hadamard", profile=built) as run:
        generate(model, prompt(60), 2)
    assert run.profile is None


def test_a_cache_outlives_its_block(model: Any) -> None:
    stock = generate(model, prompt(40))
    with nexusquant_evict(model, EXACT):
        ours = generate(model, prompt(40))
    ids = torch.cat([stock.sequences, prompt(9)], 1)
    later = generate(model, ids, cache=ours.cache)
    assert_same_run(later, generate(model, ids, cache=stock.cache))
    assert later.cache.layers[0].stored.count > 40


def test_a_cache_lives_without_a_block_and_leaves_with_its_last_copy(model: Any) -> None:
    cache = NexusCache(model, EXACT)
    stock = generate(model, prompt(40))
    assert_same_run(generate(model, prompt(40), cache=cache), stock)
    twin = copy.deepcopy(cache)
    del cache
    ids = torch.cat([stock.sequences, prompt(9)], 1)
    assert_same_run(generate(model, ids, cache=twin), generate(model, ids))


def test_caches_and_blocks_overlap(model: Any) -> None:
    with nexusquant_evict(model, HALF):
        cache = NexusCache(model, EXACT)
        generate(model, prompt(40), 2, cache=cache)  # keeps its own settings
    assert cache.stats().kept_tokens == 41
    with nexusquant_evict(model, HALF) as run:
        del cache
        generate(model, prompt(60), 1)
    assert run.stats.kept_tokens == 30
