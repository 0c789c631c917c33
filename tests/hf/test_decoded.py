"""Decoded tokens in a model: what waits, in which precision, and what is coded when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import NexusCache, UnsupportedError
from nexusquant.hf import profiles
from tests.hf.models import feed as feed_by_steps
from tests.hf.models import left_padded, prompt, tiny


def feed(model: Any, cache: Any, ids: Tensor, step: int = 0, mask: Tensor | None = None) -> Tensor:
    """In passes of `step` tokens, 0 for one of all; the mask is of all tokens up to the last."""
    with torch.no_grad():
        if mask is not None:
            return model(ids, cache=cache, attention_mask=mask).logits
        return feed_by_steps(model, cache, ids, step or ids.shape[1])


KINDS = pytest.mark.parametrize("kind", ["llama", "gemma3"])


@KINDS
def test_what_waits_behind_codes_takes_16_bits(kind: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, "high")
    feed(model, cache, prompt(10))
    assert {layer.tail.keys.dtype for layer in cache.layers} == {torch.float32}, "all is exact yet"
    feed(model, cache, prompt(60))
    feed(model, cache, prompt(5), 1)
    assert {layer.tail.keys.dtype for layer in cache.layers} == {torch.float16}
    assert {layer.tail.count for layer in cache.layers} == {5}
    exact = NexusCache(model, codec="exact", evict_ratio=0.5)
    feed(model, exact, prompt(60))
    feed(model, exact, prompt(5), 1)
    assert {layer.tail.keys.dtype for layer in exact.layers} == {torch.float32}


def test_numbers_that_16_bits_cannot_hold_wait_as_they_are() -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e6
    cache = NexusCache(model, "high", profile="none")
    feed(model, cache, prompt(60))
    assert bool(feed(model, cache, prompt(5), 1).isfinite().all())
    assert cache.layers[0].tail.values.dtype == torch.float32


@KINDS
def test_tokens_are_coded_in_blocks_and_settle_by_halves(kind: str) -> None:
    model = tiny(kind, sliding_window=512) if kind == "gemma3" else tiny(kind)
    cache = NexusCache(model, "high", fresh_length=32)
    feed(model, cache, prompt(60))
    seen = []
    for token in prompt(48).split(1, dim=1):
        feed(model, cache, token)
        fresh = cache.layers[-1].stored.fresh
        seen.append((cache.layers[-1].tail.count, 0 if fresh is None else fresh.slots.count))
    assert [tail for tail, _ in seen] == [i % 8 for i in range(1, 49)]
    assert [fresh for _, fresh in seen[7::8]] == [8, 16, 24, 32, 16, 24]


@pytest.mark.parametrize("turn", [5, 20, 40])
def test_short_turns_are_fresh_and_long_ones_scored(turn: int) -> None:
    """32 tokens, `recent`, would all be kept, and so few queries tell little."""
    model = tiny()
    cache = NexusCache(model, "balanced", evict_ratio=0.5)
    feed(model, cache, prompt(60))
    feed(model, cache, prompt(turn))
    stored = cache.layers[0].stored
    assert (stored.fresh is None) == (turn != 20)
    assert cache.stats().kept_tokens == {5: 41, 20: 56, 40: 68}[turn]


def test_more_than_a_few_wrong_tokens_can_be_taken_back() -> None:
    """`crop` reaches what waits; behind a recording, everything of it."""
    model = tiny()
    cache, twin = NexusCache(model, "high"), NexusCache(model, "high")
    for each in (cache, twin):
        feed(model, each, prompt(60))
        feed(model, each, prompt(16), 1)
    cache.activate_past_recording()
    feed(model, cache, prompt(30, seed=3), 30)
    cache.crop(-30)
    for layer in cache.layers:
        layer.stop_past_recording()
    assert cache.nbytes == twin.nbytes
    assert torch.equal(*(feed(model, each, prompt(4), 1) for each in (cache, twin)))


@KINDS
def test_fresh_tokens_can_be_taken_back(kind: str) -> None:
    model = tiny(kind, sliding_window=512) if kind == "gemma3" else tiny(kind)
    ids, mask = left_padded([60, 37])
    cache, twin = NexusCache(model, "high"), NexusCache(model, "high")
    for each in (cache, twin):
        feed(model, each, ids, mask=mask)
    for i, token in enumerate(prompt(40, 2).split(1, dim=1)):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        feed(model, cache, token, mask=mask)
        if i < 16:
            feed(model, twin, token, mask=mask)
    cache.crop(-24)
    mask = mask[:, :-23]
    assert cache.nbytes == twin.nbytes
    more = prompt(1, 2)
    assert torch.equal(*(feed(model, each, more, mask=mask) for each in (cache, twin)))
    with pytest.raises(UnsupportedError, match="only the last 17 are not in their final code"):
        cache.crop(-18)


@pytest.mark.parametrize("settings", [{}, {"evict_ratio": 0.4}, {"head_safeguard": 0.4}], ids=str)
def test_the_first_prompt_twice_is_the_same_twice(settings: dict[str, Any]) -> None:
    """In one process and, as nothing of it is kept, in another."""
    model = tiny()
    ids = prompt(520)
    settings = {"profile": "first-prompt", "evict_ratio": 0.3, **settings}
    logits, sizes = [], []
    for again in (False, False, True):
        if again:
            profiles._known.clear()
        cache = NexusCache(model, "high", **settings)
        feed(model, cache, ids)
        sizes.append(cache.nbytes)
        logits.append(feed(model, cache, prompt(12), 1))
        assert all(layer.provisional is None for layer in cache.layers)
    assert len(set(sizes)) == 1
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_bits_of_a_first_prompt_are_shared_out_between_all_layers() -> None:
    """The rates are those of the complete profile, not of each layer by itself."""
    model = tiny()
    model.model.layers[1].self_attn.o_proj.weight.data *= 30  # where noise does more
    cache = NexusCache(model, "high", profile="first-prompt")
    feed(model, cache, prompt(520))
    sizes = [sum(part.key_rows.nbytes for part in x.stored.body) for x in cache.layers]
    assert max(sizes) > min(sizes)
    rates = [part.layouts for layer in cache.layers for part in layer.stored.body]
    given = NexusCache(model, "high", profile=cache.profile)
    feed(model, given, prompt(520))
    assert rates == [part.layouts for layer in given.layers for part in layer.stored.body]


def test_a_failed_first_prompt_leaves_nothing_provisional() -> None:
    model = tiny()
    cache = NexusCache(model, "high", profile="first-prompt")
    model.model.layers[2].self_attn.v_proj.weight.data[0] = float("nan")
    with pytest.raises(Exception, match="layer 2"):
        feed(model, cache, prompt(520))
    assert cache.profile is None
    assert all(layer.provisional is None and not layer.stored.count for layer in cache.layers)


def test_rows_with_padding_decode_as_alone() -> None:
    model = tiny()
    ids, mask = left_padded([80, 45])
    both = NexusCache(model, "lossless", profile="none", key_bits=6, value_bits=6)
    alone = NexusCache(model, "lossless", profile="none", key_bits=6, value_bits=6)
    feed(model, both, ids, mask=mask)
    feed(model, alone, ids[1:, 35:])
    for token in prompt(40, 2).split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        together = feed(model, both, token, mask=mask)
        single = feed(model, alone, token[1:])
    torch.testing.assert_close(together[1:], single, rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_first_prompt_takes_the_bits_that_are_asked_for(bits: float) -> None:
    """Also where the provisional rates of all tiers would be the highest there is."""
    model = tiny()
    cache = NexusCache(model, "high", profile="first-prompt", key_bits=bits, value_bits=bits)
    feed(model, cache, prompt(520))
    parts = [part for layer in cache.layers for part in layer.stored.body]
    rows = sum(part.key_rows.numel() + part.value_rows.numel() for part in parts)
    assert 8 * rows / (2 * 2 * 16 * 516 * 3) == pytest.approx(bits, rel=0.03)


def test_a_profile_that_comes_to_nothing_leaves_nothing_provisional(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "chunk_statistics", lambda *_: None)
    model = tiny()
    sizes = []
    for mode in ("first-prompt", "none"):
        cache = NexusCache(model, "high", profile=mode)
        feed(model, cache, prompt(520))
        parts = [part for layer in cache.layers for part in layer.stored.body]
        sizes.append(sum(part.key_rows.numel() + part.value_rows.numel() for part in parts))
    assert sizes[0] == sizes[1]


def test_single_tokens_are_never_scored() -> None:
    model = tiny()
    cache = NexusCache(model, residual_length=1, recent=0, evict_ratio=0.6)
    feed(model, cache, prompt(200))
    kept = cache.stats().kept_tokens
    feed(model, cache, prompt(50), 1)
    assert cache.stats().kept_tokens == kept + 50


@pytest.mark.parametrize("sample", [2048, 64])
def test_right_padded_rows_are_coded_with_a_profile_as_alone(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has tokens enough for a mean of its own, the other goes by the profile's."""
    monkeypatch.setattr("nexusquant.plan._SAMPLE", sample)
    model = tiny()
    feed(model, built := NexusCache(model, "high", profile="first-prompt"), prompt(520))
    assert built.profile is not None
    settings = {"quality": "balanced", "profile": replace(built.profile, source="another text")}
    lengths, more = torch.tensor([320, 170]), prompt(40, 2)
    mask = (torch.arange(320) < lengths[:, None]).long()
    ids = prompt(320, 2) * mask
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    first, second = (whole.cumsum(-1) - 1).clamp(min=0).split([320, 40], 1)
    both = NexusCache(model, **settings)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=first, cache=both)
        got = model(more, attention_mask=whole, position_ids=second, cache=both).logits
    for row, length in enumerate(lengths.tolist()):
        alone = NexusCache(model, **settings)
        feed(model, alone, ids[row : row + 1, :length])
        expected = feed(model, alone, more[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], expected, rtol=0, atol=1e-4)
