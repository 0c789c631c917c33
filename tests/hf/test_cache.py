"""`NexusCache` as a transformers cache: prefill in chunks, windows, eviction, batch operations."""

from __future__ import annotations

import copy
import gc
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache, nexusquant_evict
from nexusquant.hf.layer import CompactLayer
from tests.chunks import body_slots
from tests.hf.models import (
    WINDOW,
    assert_same_run,
    feed,
    generate,
    left_padded,
    prompt,
    tiny,
)
from tests.hf.situation_cases import CODED, CODES, EXACT, FULL_AND_SLIDING, HALF


@pytest.mark.parametrize("step", [1, 7, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_prefill_by_hand_in_chunks_equals_one_pass(kind: str, attention: str, step: int) -> None:
    model = tiny(kind, attention)
    ids, mask = left_padded([60, 33])
    with torch.no_grad():
        stock = model(ids, attention_mask=mask).logits
    ours = feed(model, NexusCache(model, EXACT), ids, step, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_generate_with_prefill_chunk_size_equals_stock(kind: str) -> None:
    model = tiny(kind)
    ids = prompt(60)
    stock = generate(model, ids)
    with nexusquant_evict(model, EXACT):
        ours = generate(model, ids, prefill_chunk_size=16)
    assert_same_run(ours, stock)


@FULL_AND_SLIDING
def test_every_prefill_chunk_is_evicted(kind: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, HALF)
    feed(model, cache, prompt(96), 32)
    full = [layer for layer in cache.layers if not layer.is_sliding]
    # 32 -> 16 in every chunk, the four sinks of the first among them
    assert [layer.stored.count for layer in full] == [48] * len(full)
    for layer in full:
        for heads in body_slots(layer.stored, 1, 2):
            for slots in heads:
                chunks = [sum(b <= slot < b + 32 for slot in slots) for b in (0, 32, 64)]
                assert chunks == [12, 16, 16]
        assert len(layer.stored.body) == len(HALF.tier_shares)
    with nexusquant_evict(model, HALF) as run:
        generate(model, prompt(96), 1, prefill_chunk_size=32)
    assert run.stats.nbytes == cache.nbytes


def test_chunks_of_nothing_but_padding() -> None:
    """The first chunks of a padded batch may hold no token at all, for some rows or for all."""
    model = tiny("llama")
    for lengths in ([70, 20], [20, 12]):
        ids, mask = left_padded(lengths)
        room = ids.new_zeros(2, 80 - ids.shape[1])
        ids, mask = torch.cat([room, ids], 1), torch.cat([room, mask], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            stock = model(ids, attention_mask=mask, position_ids=positions).logits
            cache, parts = NexusCache(model, EXACT), []
            for begin in range(0, 80, 16):
                now = slice(begin, begin + 16)
                out = model(
                    ids[:, now],
                    attention_mask=mask[:, : begin + 16],
                    position_ids=positions[:, now],
                    cache=cache,
                )
                parts.append(out.logits)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(parts, 1)[real], stock[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_sliding_layers_stay_bounded_and_right_far_beyond_the_window(kind: str) -> None:
    model = tiny(kind)
    ids, mask = left_padded([3 * WINDOW, WINDOW + 5])
    stock = generate(model, ids, 5 * WINDOW, attention_mask=mask)
    cache = NexusCache(model, EXACT)
    ours = generate(model, ids, 5 * WINDOW, attention_mask=mask, cache=cache)
    assert_same_run(ours, stock)
    for settings in (EXACT, CODED):
        cache = NexusCache(model, settings)
        feed(model, cache, ids, 40, mask)
        most = 0
        for step in range(5 * WINDOW):
            feed(model, cache, prompt(1, batch=2, seed=step), 1)
            for layer in cache.layers:
                if layer.is_sliding:
                    most = max(most, layer.stored.count + layer.tail.keys.shape[2])
        # window + what waits for its block + what waits to be worth a copy
        assert WINDOW - 1 <= most <= WINDOW - 1 + 8 + 32


@pytest.mark.parametrize(
    ("kind", "tokens", "rates"),
    [
        ("gemma3", 100, [2, 2, 2]),
        ("gemma3", 200, [2.5, 2, 2.5]),
        ("gemma3", 400, [3, 2, 3]),
        ("mistral", 400, [2, 2, 2]),
    ],
)
def test_bits_are_cheap_where_few_tokens_are_held(
    kind: str, tokens: int, rates: list[float]
) -> None:
    """In sliding layers, unless all layers are."""
    model = tiny(kind, sliding_window=100)
    cache = NexusCache(model, CompressionConfig(tiers=()))
    feed(model, cache, prompt(tokens), tokens)
    feed(model, cache, prompt(300), 300)  # what was begun goes on
    for layer, rate in zip(cache.layers, rates, strict=True):
        (part,) = layer.stored.body
        for quantizer in (part.key_quantizer, part.value_quantizer):
            assert mean(bits for head in quantizer.layout.rates for bits in head) == rate


@FULL_AND_SLIDING
def test_eviction_with_exact_codec_equals_attention_with_a_per_head_mask(kind: str) -> None:
    """Oracle: the stock model whose dense mask hides, per KV head, exactly what was evicted."""
    model = tiny(kind, "eager")
    ids, mask = left_padded([64, 40])
    tail = prompt(6, batch=2, seed=9)
    settings = EXACT.replace(evict_ratio=0.6, recent=4)
    cache = NexusCache(model, settings)
    ours = feed(model, cache, torch.cat([ids, tail], 1), 64, padded(mask, 6))[:, 64:]
    kept = [kept_slots(layer, 64) for layer in cache.layers]
    assert any(not bool(k.all()) for k in kept)
    stock_cache = DynamicCache(config=model.config)
    feed(model, stock_cache, ids, 64, mask)
    handles = []
    for index, layer in enumerate(model.model.layers):
        hidden = ~kept[index].repeat_interleave(2, 1)  # to query heads

        def hide(module: Any, args: Any, kwargs: Any, hidden: Tensor = hidden) -> Any:
            old = kwargs["attention_mask"].expand(-1, 4, -1, -1).clone()
            first = 64 + 6 - old.shape[-1]  # sliding layers: masks begin at the window
            old[..., : 64 - first].masked_fill_(
                hidden[:, :, None, first:], torch.finfo(old.dtype).min
            )
            return args, {**kwargs, "attention_mask": old}

        handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
    with torch.no_grad():
        stock = model(tail, attention_mask=padded(mask, 6), cache=stock_cache).logits
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    for handle in handles:
        handle.remove()
    plain_cache = DynamicCache(config=model.config)
    plain = feed(model, plain_cache, torch.cat([ids, tail], 1), 64, padded(mask, 6))[:, 64:]
    assert (plain - stock).abs().max() > 1e-2  # the mask matters


def padded(mask: Tensor, more: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), more)], 1)


def kept_slots(layer: CompactLayer, upto: int) -> Tensor:
    """(batch, kv_heads, upto) bool: slots still stored; those a window dropped count as kept."""
    kept = torch.zeros(2, 2, upto + 1, dtype=torch.bool)
    for part in layer.stored.parts():
        at = part.slots.positions(torch.device("cpu")).expand(2, 2, -1)
        kept.scatter_(2, torch.where((at < 0) | (at >= upto), upto, at), True)
    kept[..., min(layer.tail_start, upto) : upto] = True
    if layer.is_sliding:
        kept[:] = True
    return kept[..., :upto]


def test_reset_starts_anew() -> None:
    model = tiny("gemma3")
    cache = NexusCache(model, CODED)
    first = feed(model, cache, prompt(50), 25)
    size = cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    torch.testing.assert_close(feed(model, cache, prompt(50), 25), first, rtol=0, atol=0)
    assert cache.nbytes == size


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_batch_operations_equal_stock(kind: str) -> None:
    model = tiny(kind)
    ids, mask = left_padded([40, 26])
    caches = NexusCache(model, EXACT), DynamicCache(config=model.config)
    order = [1, 0, 0, 1, 1, 0]
    results = []
    for cache in caches:
        feed(model, cache, ids, 20, mask)
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([3, 0, 1, 4, 5, 2]))
        now = mask[order]
        first = feed_more(model, cache, now, 12)
        cache.batch_select_indices(torch.tensor([4, 1]))
        now = padded(now, 12)[[4, 1]]
        results.append((first, feed_more(model, cache, now, 12)))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


@torch.no_grad()
def feed_more(model: Any, cache: Any, mask: Tensor, tokens: int) -> Tensor:
    ids = prompt(tokens, batch=len(mask), seed=3)
    return model(ids, attention_mask=padded(mask, tokens), cache=cache).logits


@CODES
def test_batch_operations_on_codes_equal_the_same_rows(settings: CompressionConfig) -> None:
    """repeat, reorder and select give what compressing those rows in that order gives."""
    model = tiny("gemma3")
    ids, mask = left_padded([40, 26])
    cache, direct = NexusCache(model, settings), NexusCache(model, settings)
    feed(model, cache, ids, 40, mask)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    order = [1, 0, 1]
    feed(model, direct, ids[order], 40, mask[order])
    for step in range(2):
        now = padded(mask[order], 12 * step)
        ours, theirs = (feed_more(model, c, now, 12) for c in (cache, direct))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_deepcopy_survives_the_original() -> None:
    """Prefix reuse: fill once, copy per continuation."""
    for attention in ("sdpa", "eager"):
        model = tiny("gemma3", attention)
        prefix = NexusCache(model, HALF)
        ids = prompt(50)
        feed(model, prefix, ids, 50)
        twin = copy.deepcopy(prefix)
        before = feed(model, prefix, prompt(12, seed=4), 12)
        size = prefix.nbytes
        del prefix
        gc.collect()
        torch.testing.assert_close(
            feed(model, twin, prompt(12, seed=4), 12), before, rtol=0, atol=0
        )
        assert twin.nbytes == size
