"""Heads that share their budget, through a model: `generate`, padded batches, bounds, fallbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache, UnsupportedError, nexusquant_evict
from nexusquant.accounting import storage_bytes
from nexusquant.compressor import compress
from nexusquant.frame import KeyFrame
from nexusquant.hf.snapshot import Snapshot
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import ExactTokens
from tests.chunks import ragged, shared, uneven
from tests.hf.models import (
    assert_rows_equal_alone,
    assert_same_run,
    feed,
    generate,
    left_padded,
    prompt,
    step_logits,
    tiny,
)

SHARED = CompressionConfig(evict_ratio=0.5, head_safeguard=0.3, residual_length=8, recent=4)
CODECS = ("exact", "e8")
KINDS = ("llama", "mistral_full", "qwen2")


def stored_of(cache: Any) -> list[Stored]:
    return [layer.stored for layer in cache.layers]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_over_uneven_heads(kind: str, codec: str) -> None:
    model = tiny(kind)
    even, cache = (
        NexusCache(model, SHARED, codec=codec, head_safeguard=safeguard) for safeguard in (1.0, 0.3)
    )
    ids = prompt(200)
    runs = [generate(model, ids, new=24, cache=x) for x in (even, cache)]
    assert any(ragged(stored) for stored in stored_of(cache))
    assert not any(ragged(stored) for stored in stored_of(even))
    assert step_logits(runs[1]).isfinite().all()
    assert (step_logits(runs[0]) - step_logits(runs[1])).abs().max() > 1e-3
    assert cache.stats().kept_tokens == pytest.approx(even.stats().kept_tokens, abs=8)
    assert cache.nbytes <= 1.06 * even.nbytes  # 16 dimensions a head: slots weigh much
    assert cache.get_seq_length() == even.get_seq_length()


@pytest.mark.parametrize("kind", KINDS)
def test_exact_codec_equals_attention_with_a_mask_per_head(kind: str) -> None:
    """Oracle: the stock model whose dense mask hides, per KV head, exactly what was evicted."""
    model, length = tiny(kind, "eager"), 120
    ids, tail = prompt(length), prompt(6, seed=9)
    cache, stock_cache = NexusCache(model, SHARED, codec="exact"), DynamicCache(config=model.config)
    feed(model, cache, ids, length)
    kept = [kept_slots(layer, length) for layer in cache.layers]
    assert any(len(set(k.sum(-1)[0].tolist())) > 1 for k in kept)
    ours = feed(model, cache, tail, 6)
    feed(model, stock_cache, ids, length)
    for layer, k in zip(model.model.layers, kept, strict=True):
        hidden = ~k.repeat_interleave(2, 1)  # to query heads

        def hide(module: Any, args: Any, kwargs: Any, hidden: Tensor = hidden) -> Any:
            old = kwargs["attention_mask"].expand(-1, 4, -1, -1).clone()
            old[..., :length].masked_fill_(hidden[:, :, None], torch.finfo(old.dtype).min)
            return args, {**kwargs, "attention_mask": old}

        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    stock = feed(model, stock_cache, tail, 6)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def kept_slots(layer: Any, length: int) -> Tensor:
    """(1, kv_heads, length) bool: slots still stored."""
    kept = torch.zeros(1, 2, length, dtype=torch.bool)
    for part in layer.stored.parts():
        at = part.slots.positions(torch.device("cpu")).expand(1, part.kv_heads, -1)
        for i, head in enumerate(part.heads or range(2)):
            kept[0, head, at[0, i, at[0, i] >= 0]] = True
    return kept


@pytest.mark.parametrize("codec", CODECS)
def test_left_padded_rows_generate_as_if_alone(codec: str) -> None:
    model = tiny()
    lengths = [141, 62, 129]
    ids, mask = left_padded(lengths)
    settings = SHARED.replace(codec=codec)
    with nexusquant_evict(model, settings):
        batch = generate(model, ids, attention_mask=mask)
    assert_rows_equal_alone(model, ids, lengths, settings, batch)


@pytest.mark.parametrize("codec", CODECS)
def test_reordered_rows_and_a_second_turn(codec: str) -> None:
    model, order = tiny(), torch.tensor([1, 0])
    ids, turn = prompt(150, batch=2), prompt(40, batch=2, seed=5)
    plain, turned = (NexusCache(model, SHARED, codec=codec) for _ in range(2))
    feed(model, plain, ids, 150)
    feed(model, turned, ids[order], 150)
    size = turned.nbytes
    turned.reorder_cache(order)
    assert turned.nbytes == size
    a, b = (feed(model, cache, turn, 40) for cache in (plain, turned))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    a, b = (feed(model, cache, turn[:, :1], 1) for cache in (plain, turned))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert plain.stats().kept_tokens < 0.6 * 191


@pytest.mark.parametrize("codec", CODECS)
def test_memory_is_bounded(codec: str) -> None:
    model = tiny()
    cache = NexusCache(model, SHARED, codec=codec, max_tokens=64)
    feed(model, cache, prompt(300), 300)
    for turn in range(4):
        assert feed(model, cache, prompt(16, seed=turn), 1).isfinite().all()
        assert cache.stats().kept_tokens <= 64 + 8
        assert all(stored.count <= 64 for stored in stored_of(cache))
    assert any(ragged(stored) for stored in stored_of(cache))


def test_a_profile_of_all_heads_codes_some() -> None:
    """A basis and rates per head: at 8 bits what comes out is what the exact codec gives."""
    model, ids = tiny(), prompt(500)
    settings = SHARED.replace(key_bits=8, value_bits=8, allocation="uniform")
    coded, exact = (NexusCache(model, settings, codec=codec) for codec in ("e8", "exact"))
    for cache in (coded, exact):
        feed(model, cache, ids, 500)
        assert any(ragged(stored) for stored in stored_of(cache))
    assert coded.profile is not None
    a, b = (feed(model, cache, prompt(4, seed=7), 4) for cache in (coded, exact))
    torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    assert not torch.equal(a, b)


def test_a_safeguard_of_one_changes_nothing() -> None:
    model = tiny()
    runs, sizes = [], []
    for changes in ({}, {"head_safeguard": 1}):
        settings = CompressionConfig(evict_ratio=0.5, residual_length=8, recent=4)
        cache = NexusCache(model, settings, **changes)
        runs.append(generate(model, prompt(100), cache=cache))
        sizes.append(storage_bytes([layer.tensors() for layer in cache.layers]))
    assert_same_run(*runs, tolerance=0)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_exist_only_where_all_heads_have_the_tokens(codec: str) -> None:
    """The last 8 tokens were kept by all heads, in whatever part; before that there are holes."""
    source = uneven(200)
    stored = compress(shared(codec, key_bits=8, value_bits=8), Stored(), source)
    assert any(part.heads and int(part.slots.positions(part.device).max()) >= 192
               for part in ragged(stored))  # fmt: skip
    layer: Any = SimpleNamespace(frame=lambda: KeyFrame(None, 0), layer_idx=0)
    tail = torch.randn(2, 2, 3, 5, 32)
    snapshot = Snapshot(layer, stored, tail[0], tail[1], 200, 1, 192)
    keys, values = snapshot.dense(0), snapshot.dense(1)
    for found, x, new in ((keys, source.keys, tail[0]), (values, source.values, tail[1])):
        atol = 0.1 if codec == "e8" else 0
        torch.testing.assert_close(found, torch.cat([x[:, :, 192:], new], 2), rtol=0, atol=atol)
    with pytest.raises(UnsupportedError, match="evicted"):
        Snapshot(layer, stored, tail[0], tail[1], 200, 1, 100).dense(0)


def test_a_token_that_one_head_lacks_is_missed_wherever_it_is() -> None:
    parts = [
        ExactTokens(
            *torch.randn(2, 1, len(heads or (0, 1)), len(at), 8),
            Slots.of(torch.tensor([[at]])),
            heads,
        )
        for heads, at in ((None, [1, 2]), ((1,), [0]))
    ]
    layer: Any = SimpleNamespace(frame=lambda: KeyFrame(None, 0), layer_idx=0)
    tail = torch.randn(2, 1, 2, 1, 8)
    with pytest.raises(UnsupportedError, match="evicted"):
        Snapshot(layer, Stored(None, tuple(parts)), tail[0], tail[1], 3, 1, 0).dense(1)
