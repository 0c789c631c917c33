"""Drafts behind compressed caches: what is taken back, and what comes after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache, nexusquant_evict
from tests.hf.models import assert_same_run, feed, generate, prompt, tiny
from tests.hf.situation_cases import CODED, CODES, EXACT, FULL_AND_SLIDING

DRAFTS = pytest.mark.parametrize("draft", ["lookup", "assistant"])


def drafting(draft: str, kind: str) -> dict[str, Any]:
    if draft == "lookup":
        return {"prompt_lookup_num_tokens": 4}
    assistant, generator = tiny(kind), torch.Generator().manual_seed(1)
    for weight in assistant.parameters():  # alike, but not the same
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += 0.25 * weight.data.std() * noise
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


@DRAFTS
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@FULL_AND_SLIDING
def test_drafts_behind_codes_equal_greedy_decoding(kind: str, ratio: float, draft: str) -> None:
    """As long as the first draft is wrong and no block fills: those are cut elsewhere."""
    model, ids = tiny(kind), prompt(12).repeat(1, 4)
    settings = CompressionConfig(residual_length=32, recent=4, evict_ratio=ratio)
    lengths = []
    with nexusquant_evict(model, settings) as run:
        greedy = generate(model, ids, 25)
        model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["cache"].get_seq_length()),
            with_kwargs=True,
        )
        drafted = generate(model, ids, 25, **drafting(draft, kind))
    assert run.stats.compressed_layers >= 1
    assert lengths[:2] == [0, 48], "the first draft was wrong"
    assert len(lengths) < 25, "some others were right"
    assert_same_run(drafted, greedy)


@pytest.mark.parametrize("seed", [1, 3])
@CODES
def test_what_was_taken_back_leaves_no_trace_in_the_codes(
    settings: CompressionConfig, seed: int
) -> None:
    model, ids = tiny(), prompt(88, seed=seed)
    drafted, direct = NexusCache(model, settings), NexusCache(model, settings)
    drafted.activate_past_recording()
    feed(model, drafted, ids, 88)
    drafted.crop(-40)
    feed(model, direct, ids[:, :48], 48)
    logits = [feed(model, cache, prompt(5), 5) for cache in (drafted, direct)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@DRAFTS
@FULL_AND_SLIDING
def test_drafts_behind_a_prefilled_cache_equal_stock(kind: str, draft: str) -> None:
    """Which reads the whole prompt again (transformers 5.23)."""
    model, ids = tiny(kind), prompt(12).repeat(1, 4)
    outputs = []
    for cache in (NexusCache(model, EXACT), DynamicCache(config=model.config)):
        feed(model, cache, ids[:, :20], 20)
        cache.activate_past_recording()
        out = generate(model, ids, 25, cache=cache, **drafting(draft, kind))
        outputs.append((out, cache.get_seq_length()))
    (ours, length), (stock, stock_length) = outputs
    assert length == stock_length
    assert_same_run(ours, stock)


@DRAFTS
def test_a_plain_turn_after_drafts_compresses_again(draft: str) -> None:
    model = tiny()
    cache = NexusCache(model, CODED)
    out = generate(model, prompt(40), 10, cache=cache, **drafting(draft, "llama"))
    generate(model, out.sequences, 40, cache=cache)
    assert all(layer.tail.count < 8 for layer in cache.layers)
