"""Taking tokens back: `crop` with a recorded past, and the decoding that relies on it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from nexusquant import NexusCache, UnsupportedError, nexusquant_evict
from tests.chunks import body_slots
from tests.hf.models import feed, generate, prompt, step_logits, tiny
from tests.hf.situation_cases import CODED, EXACT, FULL_AND_SLIDING, HALF


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_recorded_past_can_be_rolled_back(kind: str) -> None:
    model = tiny(kind)
    caches = NexusCache(model, EXACT), DynamicCache(config=model.config)
    results = []
    for cache in caches:
        cache.activate_past_recording()
        outputs = [feed(model, cache, prompt(50), 50)]
        for remove in (13, 0, 5):
            cache.crop(-remove)
            outputs.append(feed(model, cache, prompt(11, seed=remove), 11))
        cache.crop(-1)
        results.append((torch.cat(outputs, 1), cache.get_seq_length()))
    (ours, length), (stock, stock_length) = results
    assert length == stock_length
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    assert caches[0].stats().compressed_layers == 3


def test_recorded_past_is_evicted_at_the_crop() -> None:
    """Deferred: nothing is dropped before `crop`, then the policy applies to what is left."""
    model = tiny("llama")
    cache = NexusCache(model, HALF)
    cache.activate_past_recording()
    feed(model, cache, prompt(50), 50)
    assert cache.stats().compressed_layers == 0
    cache.crop(-10)
    direct = NexusCache(model, HALF)
    feed(model, direct, prompt(50)[:, :40], 40)
    for mine, theirs in zip(cache.layers, direct.layers, strict=True):
        assert body_slots(mine.stored, 1, 2) == body_slots(theirs.stored, 1, 2)
        assert len(mine.stored.body) == len(theirs.stored.body) == len(HALF.tier_shares)
    assert cache.stats().kept_tokens == 20


def test_a_deferred_prompt_leaves_no_lesser_profile_behind() -> None:
    """What the model's output goes into is not known at the crop: it is built before."""
    model, other = tiny("llama"), tiny("llama")
    cache, direct = NexusCache(model), NexusCache(other)
    cache.activate_past_recording()
    feed(model, cache, prompt(560), 560)
    cache.crop(-20)
    feed(model, cache, prompt(5), 5)
    feed(other, direct, prompt(560), 560)
    left, whole = cache.profile, direct.profile
    assert left is not None
    assert whole is not None
    for index, layer in whole.layers.items():
        for side in ("key", "value"):
            mine, theirs = getattr(left.layers[index], side), getattr(layer, side)
            torch.testing.assert_close(mine.weight, theirs.weight)


def test_crop_of_coded_tokens_is_refused_and_changes_nothing() -> None:
    model = tiny("llama")
    cache = NexusCache(model, CODED)
    feed(model, cache, prompt(40), 40)
    twin = copy.deepcopy(cache)
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        cache.crop(-3)
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(
        feed(model, cache, prompt(9), 9), feed(model, twin, prompt(9), 9), rtol=0, atol=0
    )


@FULL_AND_SLIDING
def test_prompt_lookup_equals_greedy(kind: str) -> None:
    model = tiny(kind)
    ids = prompt(12).repeat(1, 4)  # repetition gives the lookup something to find
    stock = generate(model, ids, 30)
    for cache in (NexusCache(model, EXACT), None):
        with nexusquant_evict(model, EXACT):
            ours = generate(model, ids, 30, prompt_lookup_num_tokens=4, cache=cache)
        assert torch.equal(ours.sequences, stock.sequences)


@FULL_AND_SLIDING
def test_assisted_decoding_equals_greedy(kind: str) -> None:
    model, assistant = tiny(kind), tiny(kind, seed=7)
    ids = prompt(40)
    stock = generate(model, ids, 20)
    with nexusquant_evict(model, EXACT), nexusquant_evict(assistant, EXACT):
        ours = generate(model, ids, 20, assistant_model=assistant)
    assert torch.equal(ours.sequences, stock.sequences)
    assert step_logits(ours).shape == step_logits(stock).shape
