"""`generate` on compressed caches against stock `generate`: with exact codes they must agree."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, set_seed

from nexusquant import CompressionConfig, NexusCache, nexusquant_evict
from tests.hf.models import (
    ATTENTIONS,
    KINDS,
    assert_rows_equal_alone,
    assert_same_run,
    generate,
    left_padded,
    prompt,
    step_logits,
    tiny,
)
from tests.hf.situation_cases import CODED, CODES, EXACT, FULL_AND_SLIDING

LENGTHS = [41, 12, 29, 36]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_batch_with_exact_codec_equals_stock_and_single_rows(
    kind: str, attention: str
) -> None:
    model = tiny(kind, attention)
    ids, mask = left_padded(LENGTHS)
    stock = generate(model, ids, attention_mask=mask)
    with nexusquant_evict(model, EXACT) as run:
        ours = generate(model, ids, attention_mask=mask)
    assert run.stats.compressed_layers == 3
    assert_same_run(ours, stock)
    assert_rows_equal_alone(model, ids, LENGTHS, EXACT, ours)


@CODES
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_rows_are_coded_as_if_alone(kind: str, settings: CompressionConfig) -> None:
    # Bits in a window follow from the longest row: none is longer than this one.
    model = tiny(kind, **({"sliding_window": max(LENGTHS)} if kind == "gemma3" else {}))
    ids, mask = left_padded(LENGTHS)
    with nexusquant_evict(model, settings):
        batch = generate(model, ids, attention_mask=mask)
    stock = generate(model, ids, attention_mask=mask)
    # The codes are in use: a shift that no rounding explains.
    assert (step_logits(batch) - step_logits(stock)).abs().max() > 1e-2
    assert_rows_equal_alone(model, ids, LENGTHS, settings, batch)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_three_turns_on_one_cache_equal_stock(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    cache, stock_cache = NexusCache(model, EXACT), DynamicCache(config=model.config)
    ids, mask = left_padded([30, 21])
    for turn in range(3):
        ours = generate(model, ids, attention_mask=mask, cache=cache)
        stock = generate(model, ids, attention_mask=mask, cache=stock_cache)
        assert_same_run(ours, stock)
        user = prompt(9 + turn, batch=2, seed=turn)
        ids = torch.cat([ours.sequences, user], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
    assert cache.get_seq_length() == stock_cache.get_seq_length()


def test_turns_inside_the_block_continue_the_returned_cache() -> None:
    model = tiny("llama")
    ids, past, stock_past = prompt(30), None, None
    with nexusquant_evict(model, EXACT) as run:
        sequences = []
        for turn in range(3):
            ours = generate(model, ids, cache=past)
            past = ours.cache
            sequences.append(ours)
            ids = torch.cat([ours.sequences, prompt(10, seed=turn)], 1)
        assert run.stats.tokens == past.get_seq_length()
    ids = prompt(30)
    for turn, ours in enumerate(sequences):
        stock = generate(model, ids, cache=stock_past)
        stock_past = stock.cache
        assert_same_run(ours, stock)
        ids = torch.cat([stock.sequences, prompt(10, seed=turn)], 1)


@CODES
def test_every_turn_is_evicted(settings: CompressionConfig) -> None:
    """Turns that reach `residual_length` are evicted like the first prompt."""
    model = tiny("llama")
    cache = NexusCache(model, settings)
    ids = prompt(60)
    for turn in range(3):
        out = generate(model, ids, 4, cache=cache)
        ids = torch.cat([out.sequences, prompt(60, seed=turn)], 1)
    stats = cache.stats()
    share = stats.kept_tokens / stats.tokens
    assert share == 1.0 if not settings.evict_ratio else 0.45 < share < 0.6


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_beam_search_with_exact_codec_equals_stock(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    ids, mask = left_padded([33, 20])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    beams |= {"attention_mask": mask, "output_scores": True}
    stock = generate(model, ids, 14, **beams)
    with nexusquant_evict(model, EXACT):
        ours = generate(model, ids, 14, **beams)
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, rtol=0, atol=1e-4)


def test_reordered_codes_go_on_as_if_never_reordered() -> None:
    """`reorder_cache` moves codes, means, slots and rotary rows together."""
    model = tiny("llama")
    ids, mask = left_padded([33, 20])
    settings = CODED.replace(evict_ratio=0.5)
    cache = NexusCache(model, settings)
    out = generate(model, ids, 20, attention_mask=mask, cache=cache)
    other = NexusCache(model, settings)
    swap = torch.tensor([1, 0])
    generate(model, ids[swap], 20, attention_mask=mask[swap], cache=other)
    other.reorder_cache(swap)
    again = torch.cat([out.sequences, prompt(3, batch=2)], 1)
    mask = torch.cat([mask, mask.new_ones(2, 23)], 1)
    mine = generate(model, again, 12, attention_mask=mask, cache=cache)
    theirs = generate(model, again, 12, attention_mask=mask, cache=other)
    assert_same_run(mine, theirs)


@FULL_AND_SLIDING
def test_sampling_several_sequences_equals_stock(kind: str) -> None:
    model = tiny(kind)
    ids, mask = left_padded([33, 20])
    sample = {"do_sample": True, "num_return_sequences": 3, "attention_mask": mask}
    set_seed(5)
    stock = generate(model, ids, **sample)
    with nexusquant_evict(model, EXACT):
        set_seed(5)
        ours = generate(model, ids, **sample)
    assert_same_run(ours, stock)


@pytest.mark.parametrize("length", [1, 34, 4000])
@FULL_AND_SLIDING
def test_short_and_long_prompts(kind: str, length: int) -> None:
    model = tiny(kind)
    ids = prompt(length)
    stock = generate(model, ids, 10)
    with nexusquant_evict(model, EXACT) as run:
        ours = generate(model, ids, 10)
    assert_same_run(ours, stock)
    with nexusquant_evict(model, "balanced") as run:
        generate(model, ids, 10)
    assert run.stats.tokens == length + 9
    if length == 4000:
        assert run.stats.compression_ratio > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("attention", ATTENTIONS)
@FULL_AND_SLIDING
def test_other_dtypes_stay_within_their_own_rounding(
    kind: str, attention: str, dtype: torch.dtype
) -> None:
    """Exact codes: at most twice the error that stock makes in this dtype against fp64."""
    ids = prompt(40)
    truth = tiny(kind, attention).double()(ids).logits[:, -8:]
    model = tiny(kind, attention).to(dtype)
    cache = NexusCache(model, EXACT)
    with torch.no_grad():
        stock = model(ids).logits[:, -8:].double()
        for part in (ids[:, :20], ids[:, 20:32]):
            model(part, cache=cache)
        ours = model(ids[:, 32:], cache=cache).logits
    assert ours.dtype == dtype
    error = (stock - truth).square().mean().sqrt()
    assert (ours.double() - truth).square().mean().sqrt() <= 2 * error + 1e-6
    coded = NexusCache(model, CODED)
    out = generate(model, ids, 10, cache=coded)
    assert torch.isfinite(step_logits(out)).all()
    assert coded.stats().compressed_layers == 3
