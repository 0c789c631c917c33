"""Models that multiply queries, keys and values themselves: evicted and coded like all others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache, UnsupportedError
from nexusquant.hf.quirks import attention_modules, layer_of
from tests.hf.models import left_padded
from tests.zoo.builders import build

OWN = ("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "rembert")
HALF = CompressionConfig(
    codec="exact", evict_ratio=0.5, scorer="key_norm", recent=8, residual_length=16
)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*OWN, "falcon-eager"])
def test_eviction_equals_attention_with_a_mask_per_head(model_type: str) -> None:
    """Oracle: the stock model whose masks hide, per head, exactly what was evicted."""
    name, _, attention = model_type.partition("-")
    model = build(name)
    if attention:
        model.set_attn_implementation(attention)
    ids, mask = left_padded([64, 40])
    more = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(9))
    whole = torch.cat([mask, mask.new_ones(2, 6)], 1)
    cache, stock_cache = NexusCache(model, HALF), DynamicCache(config=model.config)
    for each in (cache, stock_cache):
        model(ids, attention_mask=mask, cache=each)
    kept = {layer.layer_idx: kept_slots(layer, 64) for layer in cache.layers}
    assert all(not bool(k.all()) for k in kept.values())
    plain = model(more, attention_mask=whole, cache=copied(stock_cache)).logits
    ours = model(more, attention_mask=whole, cache=cache).logits
    handles = [
        module.register_forward_pre_hook(hide(kept[layer_of(module)]), with_kwargs=True)
        for _, module in attention_modules(model)
        if all(layer_of(inner) is None for inner in module.children())
    ]
    assert len(handles) == len(kept)
    stock = model(more, attention_mask=whole, cache=stock_cache).logits
    for handle in handles:
        handle.remove()
    scale = max(1.0, float(stock.abs().max()))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * scale)
    assert (plain - stock).abs().max() > 1e-3 * scale  # what was evicted matters


def hide(kept: Tensor) -> Any:
    """A hook that hides from all queries what is not in `kept` (batch, kv_heads, slots)."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        old = kwargs["attention_mask"]
        heads = next(
            getattr(module, name)
            for name in ("num_attention_heads", "num_heads", "n_heads")
            if hasattr(module, name)
        )
        hidden = ~kept.repeat_interleave(heads // kept.shape[1], 1)[:, :, None]
        new = old.expand(-1, heads, -1, -1).clone()
        own = new[..., : hidden.shape[-1]]
        flips = old.dtype == torch.bool and type(module).__name__ == "MptAttention"
        least = True if flips else False if old.dtype == torch.bool else torch.finfo(old.dtype).min
        own.masked_fill_(hidden, least)
        return args, {**kwargs, "attention_mask": new}

    return hook


def kept_slots(layer: Any, upto: int) -> Tensor:
    """(batch, kv_heads, upto) bool: slots still stored, coded or not."""
    heads = layer.tail.keys.shape[1]
    kept = torch.zeros(2, heads, upto + 1, dtype=torch.bool)
    for part in layer.stored.parts():
        at = part.slots.positions(torch.device("cpu")).expand(2, heads, -1)
        kept.scatter_(2, torch.where(at < 0, upto, at), True)
    return kept[..., :upto]


def copied(cache: DynamicCache) -> DynamicCache:
    new = DynamicCache()
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


@torch.no_grad()
@pytest.mark.parametrize("model_type", OWN)
def test_codes_take_what_they_take_elsewhere_and_serve_as_well(model_type: str) -> None:
    model = build(model_type)
    ids, _ = left_padded([120])
    exact, coded = (
        NexusCache(model, "high", residual_length=16, **more)
        for more in ({"codec": "exact"}, {"key_bits": 6, "value_bits": 6, "tiers": ()})
    )
    for cache in (exact, coded):
        model(ids[:, :100], cache=cache)
        out = [model(ids[:, i : i + 1], cache=cache).logits for i in range(100, 120)]
        logits = torch.cat(out, 1)
        if cache is exact:
            stock = logits
    assert 0 < (logits - stock).abs().max() < 0.2 * stock.abs().max()
    assert coded.nbytes < exact.nbytes / 2
    assert coded.stats().compressed_layers == len(coded.layers)


def test_a_model_that_reads_its_values_keeps_all_tokens() -> None:
    model = build("doge")
    ids, mask = left_padded([80, 50])
    cache = NexusCache(model, "max")
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        logits = model(ids[:, :1], cache=cache).logits
    assert logits.isfinite().all()
    assert all(layer.stored.count == 80 for layer in cache.layers)


@torch.no_grad()
def keys_of_a_llama(quality: str, **settings: Any) -> Tensor:
    """Those of its first layer, behind a prompt."""
    model = build("llama")
    cache = NexusCache(model, quality, **settings)
    model(left_padded([80])[0], cache=cache)
    return cache.layers[0].keys


def test_what_was_evicted_before_a_model_reads_it_is_refused() -> None:
    keys = keys_of_a_llama("max", evict_ratio=0.4)
    for read in (lambda: keys.sum(), lambda: keys.transpose(1, 2) + 0, lambda: keys @ keys.mT):
        with pytest.raises(UnsupportedError, match="evicted or padded"):
            read()


@pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning")
@pytest.mark.parametrize("model_type", [*OWN, "deepseek_v3", "doge", "llama"])
def test_gradients_are_right_or_refused(model_type: str) -> None:
    model = build(model_type)
    ids, _ = left_padded([60])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient(cache: Any) -> Tensor:
        logits = model(inputs_embeds=embedded, cache=cache).logits
        return torch.autograd.grad(logits.square().sum(), embedded)[0]

    cache = NexusCache(model, "max", evict_ratio=0.4)
    stock = gradient(DynamicCache(config=model.config))
    torch.testing.assert_close(gradient(cache), stock, rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedError, match=r"no gradient flows into|evicted or padded"):
        gradient(cache)


@pytest.mark.parametrize("model_type", [name for name in OWN if name != "falcon"])
def test_inference_mode_and_no_grad_take_turns(model_type: str) -> None:
    model = build(model_type)
    ids, _ = left_padded([100])
    results = []
    for modes in ((torch.no_grad, torch.no_grad), (torch.inference_mode, torch.no_grad),
                  (torch.no_grad, torch.inference_mode)):  # fmt: skip
        cache = NexusCache(model, "balanced")
        for mode, tokens in zip((*modes, modes[0]), (ids[:, :60], ids[:, 60:61], ids), strict=True):
            with mode():
                logits = model(tokens, cache=cache).logits
        assert all(layer.reached and not layer.read for layer in cache.layers)
        results.append((logits, cache.nbytes))
    for logits, nbytes in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=1e-4)
        assert nbytes == results[0][1]


@torch.no_grad()
@pytest.mark.parametrize("model_type", OWN)
def test_padding_is_not_stored(model_type: str) -> None:
    model = build(model_type)
    ids, mask = left_padded([150, 50])
    both, alone = (NexusCache(model, "max", tiers=()) for _ in range(2))
    model(input_ids=ids, attention_mask=mask, cache=both)
    model(input_ids=ids[1:, 100:], cache=alone)
    for layer, own in zip(both.layers, alone.layers, strict=True):
        heads = layer.tail.keys.shape[1]
        assert last_row(layer, heads) == last_row(own, heads)


def last_row(layer: Any, heads: int) -> int:
    """Entries that the last batch row has in all heads."""
    rows = layer.tail.keys.shape[0]
    slots = [part.slots.positions(part.device) for part in layer.stored.parts()]
    return sum(int((at.expand(rows, heads, -1)[-1] >= 0).sum()) for at in slots)


def test_writing_into_keys_is_refused() -> None:
    keys = keys_of_a_llama("lossless")
    for write in (
        keys.zero_, lambda: keys.__setitem__((0, 0, 0), 5.0),
        lambda: torch.mul(keys + 0, 2, out=keys),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="cannot be written to"):
            write()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["deepseek_v3", "doge"])
def test_max_tokens_that_cannot_be_kept_is_said(model_type: str) -> None:
    model = build(model_type)
    cache = NexusCache(model, "high", max_tokens=64)
    ids, _ = left_padded([120])
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        model(ids, cache=cache)
    assert any("max_tokens does not bound" in str(x.message) for x in given)
