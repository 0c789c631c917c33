"""`nexusquant_evict` leaves a model exactly as it found it, whatever happens inside."""

from __future__ import annotations

import contextvars
import copy
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from nexusquant import CompressionConfig, NexusCache, NexusQuantError, nexusquant_evict
from nexusquant.hf.layer import CompactLayer
from tests.hf.models import ATTENTIONS, assert_same_run, generate, prompt, tiny

EXACT = CompressionConfig(codec="exact", residual_length=8)
HALF = CompressionConfig(evict_ratio=0.5, residual_length=8, recent=4)


class State:
    """Everything the block could have touched, with the outputs."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys = {name: set(vars(module)) for name, module in model.named_modules()}
        self.hooks = self._hooks()
        self.attention = model.config._attn_implementation
        self.config = model.config.to_dict()
        for name in ("architectures", "dtype"):  # save_pretrained fills them in
            self.config.pop(name)
        self.mappings = [
            dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)
        ]
        with torch.no_grad():
            self.logits = model(prompt(30)).logits

    def _hooks(self) -> list[list[Any]]:
        return [
            [
                *m._forward_pre_hooks.values(),
                *m._forward_hooks.values(),
                *m._forward_pre_hooks_with_kwargs,
                *m._forward_hooks_always_called,
            ]
            for m in self.model.modules()
        ]

    def assert_restored(self) -> None:
        now = State(self.model)
        assert now.keys == self.keys
        assert now.hooks == self.hooks
        assert now.attention == self.attention
        assert now.config == self.config
        for before, after in zip(self.mappings, now.mappings, strict=True):
            assert before.keys() == after.keys()
            assert all(before[name] is after[name] for name in before)
        assert torch.equal(now.logits, self.logits)


@pytest.fixture(params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that every test must leave as it was."""
    model = tiny("llama", request.param)
    state = State(model)
    yield model
    state.assert_restored()


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
    assert all(isinstance(layer, CompactLayer) for layer in out.past_key_values.layers)


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


def test_two_threads_with_settings_of_their_own(model: Any) -> None:
    gate = threading.Barrier(2, timeout=60)
    kept: dict[float, float] = {}
    errors: list[BaseException] = []

    def work(ratio: float) -> None:
        try:
            with nexusquant_evict(model, HALF.replace(evict_ratio=ratio)) as run:
                gate.wait()  # both are inside
                for _ in range(3):
                    generate(model, prompt(100), 3)
                    gate.wait()
                kept[ratio] = run.stats.kept_tokens
                gate.wait()  # neither leaves before the other is done
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(ratio,)) for ratio in (0.2, 0.7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert kept == {0.2: 82, 0.7: 32}


def test_a_worker_started_inside_the_block_is_compressed(model: Any) -> None:
    """The streamer pattern: `generate` runs in a thread, which inherits no context."""

    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Tokenizer(), timeout=60)
    with nexusquant_evict(model, HALF) as run:
        kwargs = {"input_ids": prompt(60), "max_new_tokens": 5, "do_sample": False}
        worker = threading.Thread(target=model.generate, kwargs={**kwargs, "streamer": streamer})
        worker.start()
        words = "".join(streamer).split()
        worker.join()
    assert len(words) == 60 + 5
    assert run.stats.kept_tokens == 30 + 4


def test_a_worker_that_outlives_the_block_ends_well(model: Any) -> None:
    stock = generate(model, prompt(40), 20)
    inside, left = threading.Event(), threading.Event()
    outputs: list[Any] = []

    class Pause:
        """A streamer that stops after the first token until the block has been left."""

        def put(self, value: Any) -> None:
            inside.set()
            left.wait(60)

        def end(self) -> None:
            pass

    def work() -> None:
        outputs.append(generate(model, prompt(40), 20, streamer=Pause()))

    with nexusquant_evict(model, EXACT):
        worker = threading.Thread(target=work)
        worker.start()
        inside.wait(60)
    left.set()
    worker.join()
    assert_same_run(outputs.pop(), stock)


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
        model(prompt(40), past_key_values=cache)
    assert not any(isinstance(layer, CompactLayer) for layer in cache.layers)


def test_another_model_is_untouched(model: Any) -> None:
    other = tiny("gemma3", model.config._attn_implementation, seed=3)
    state = State(other)
    stock = generate(other, prompt(50))
    with nexusquant_evict(model, HALF), nexusquant_evict(tiny("qwen2"), HALF):
        assert other.config._attn_implementation == state.attention
        assert not other._forward_pre_hooks
        ours = generate(other, prompt(50))
    assert all(not isinstance(layer, CompactLayer) for layer in ours.past_key_values.layers)
    assert_same_run(ours, stock, 0)
    state.assert_restored()


def test_a_copy_made_inside_is_free_of_us(model: Any) -> None:
    stock = generate(model, prompt(50))
    with nexusquant_evict(model, HALF):
        generate(model, prompt(50), 2)
        twin = copy.deepcopy(model)
        inside = generate(twin, prompt(50))
    assert not any(isinstance(layer, CompactLayer) for layer in inside.past_key_values.layers)
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


def test_a_cache_outlives_its_block(model: Any) -> None:
    stock = generate(model, prompt(40))
    with nexusquant_evict(model, EXACT):
        ours = generate(model, prompt(40))
    ids = torch.cat([stock.sequences, prompt(9)], 1)
    later = generate(model, ids, past_key_values=ours.past_key_values)
    assert_same_run(later, generate(model, ids, past_key_values=stock.past_key_values))
    assert later.past_key_values.layers[0].stored.count > 40


def test_a_cache_lives_without_a_block_and_leaves_with_its_last_copy(model: Any) -> None:
    cache = NexusCache(model, EXACT)
    stock = generate(model, prompt(40))
    assert_same_run(generate(model, prompt(40), past_key_values=cache), stock)
    twin = copy.deepcopy(cache)
    del cache
    ids = torch.cat([stock.sequences, prompt(9)], 1)
    assert_same_run(generate(model, ids, past_key_values=twin), generate(model, ids))


def test_caches_and_blocks_overlap(model: Any) -> None:
    with nexusquant_evict(model, HALF):
        cache = NexusCache(model, EXACT)
        generate(model, prompt(40), 2, past_key_values=cache)  # keeps its own settings
    assert cache.stats().kept_tokens == 41
    with nexusquant_evict(model, HALF) as run:
        del cache
        generate(model, prompt(60), 1)
    assert run.stats.kept_tokens == 30
