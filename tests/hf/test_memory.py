"""Bytes: what the cache reports is what a walk over its objects finds, and peaks really fall."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from nexusquant import NexusCache
from nexusquant.hf.handle import KVHandle
from tests.hf.models import KINDS, WINDOW, generate, left_padded, prompt, tiny
from tests.hf.situation_cases import CODED


def reachable(root: Any) -> Iterator[Tensor]:
    """All tensors reachable from an object, through attributes, slots and containers."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        thing = stack.pop()
        leaf = (str, bytes, int, float, bool, type(None), type, torch.nn.Module, weakref.ref)
        if id(thing) in seen or isinstance(thing, leaf):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            stack.extend(thing.values())
        elif isinstance(thing, (list, tuple, set, frozenset)):
            stack.extend(thing)
        else:
            stack.extend(getattr(thing, "__dict__", {}).values())
            for kind in type(thing).__mro__:
                slots = getattr(kind, "__slots__", ())
                names = (slots,) if isinstance(slots, str) else slots
                stack.extend(getattr(thing, name) for name in names if hasattr(thing, name))


def walked_bytes(root: Any) -> int:
    storages = (tensor.untyped_storage() for tensor in reachable(root))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def dense_elements(cache: DynamicCache) -> int:
    return sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("evict_ratio", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_reported_bytes_are_those_a_walk_finds(kind: str, evict_ratio: float) -> None:
    model = tiny(kind)
    ids, mask = left_padded([90, 61])
    settings = CODED.replace(evict_ratio=evict_ratio)
    cache, stock = NexusCache(model, settings), DynamicCache(config=model.config)
    assert cache.nbytes == walked_bytes(cache) == 0
    out = generate(model, ids, 1, attention_mask=mask, cache=cache)
    generate(model, ids, 1, attention_mask=mask, cache=stock)
    for new in (3, 12, 40):
        measured = walked_bytes(cache)
        assert cache.nbytes == measured > 0
        elements = dense_elements(stock)
        assert cache.bits_per_element == pytest.approx(8 * measured / elements, rel=0.01)
        assert cache.compression_ratio == pytest.approx(2 * elements / measured, rel=0.01)
        ids = out.sequences
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        out = generate(model, ids, new, attention_mask=mask, cache=cache)
        generate(model, ids, new, attention_mask=mask, cache=stock)


def test_walk_agrees_after_batch_operations_rollback_and_deferral() -> None:
    model = tiny("gemma3")
    cache = NexusCache(model, CODED)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(50, batch=2), cache=cache)
        assert cache.nbytes == walked_bytes(cache)
        cache.crop(-5)
        assert cache.nbytes == walked_bytes(cache)
        cache.batch_repeat_interleave(3)
        assert cache.nbytes == walked_bytes(cache)
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.nbytes == walked_bytes(cache)
        model(prompt(3), cache=cache)
        cache.crop(-2)
    assert cache.nbytes == walked_bytes(cache)
    cache.reset()
    assert cache.nbytes == walked_bytes(cache) == 0


def test_fused_projections_do_not_hide_behind_short_tails() -> None:
    """gpt_neox's values are views of queries, keys and values together."""
    model = tiny("gpt_neox")
    cache = NexusCache(model, "lossless")
    with torch.no_grad():
        model(prompt(20), cache=cache)
    assert cache.stats().compressed_layers == 0
    assert walked_bytes(cache) <= 1.01 * 4 * cache.stats().elements + 4 * 20 + 64


def test_window_only_models_do_not_grow() -> None:
    model = tiny("mistral")
    cache = NexusCache(model, CODED)
    sizes = []
    with torch.no_grad():
        model(prompt(4 * WINDOW), cache=cache)
        for step in range(160):
            model(prompt(1, seed=step), cache=cache)
            sizes.append(cache.nbytes)
    # Positions of forgotten slots are all that may grow, one int32 per token; a stored token takes
    # 772 bytes until its block is coded, then 60.
    assert max(sizes[80:]) <= max(sizes[:80]) + 4 * 160


def test_nothing_of_a_forward_pass_stays_behind() -> None:
    """Workspace (rotary rows, handles, hooks' notes) is gone when `forward` returns."""
    model = tiny("llama")
    cache = NexusCache(model, CODED)
    live = LiveBytes()
    with torch.no_grad():
        model(prompt(20), cache=NexusCache(model, CODED))  # constants of the codec
    with live, torch.no_grad():
        for _ in range(3):
            model(prompt(400), cache=cache, logits_to_keep=1)
            model(prompt(400), use_cache=False, logits_to_keep=1)
    assert live.now() == cache.nbytes
    del cache
    assert live.now() == 0


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages allocated by ops inside that are still alive; `peak` is their top."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in reachable([args, kwargs]) if not isinstance(t, KVHandle)]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        out = func(*args, **(kwargs or {}))
        for tensor in reachable(out):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in known:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(size for _, size in self.storages.values())


@pytest.mark.parametrize(
    "quality", ["lossless", pytest.param("balanced", marks=pytest.mark.slow), "max"]
)
@pytest.mark.parametrize("attention", ["sdpa"])
def test_peak_memory_of_a_prefill_falls(quality: str, attention: str) -> None:
    """Layers are compressed one by one as the prefill reaches them, not at its end."""
    model = tiny("llama", attention, num_hidden_layers=24, num_key_value_heads=4, head_dim=32)
    ids = prompt(1024)
    peaks = []
    for cache in (DynamicCache(config=model.config), NexusCache(model, quality)):
        gc.collect()
        live = LiveBytes()
        with live, torch.no_grad():
            model(ids, cache=cache, logits_to_keep=1)
        peaks.append(live.peak)
    plain, ours = peaks
    dense = 24 * 2 * 4 * 1024 * 32 * 4
    assert plain > dense  # the tracker sees the stock cache
    assert ours < 0.6 * plain
