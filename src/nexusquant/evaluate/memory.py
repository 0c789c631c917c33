"""Bytes that a prefilled cache occupies, measured from outside the cache."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.evaluate.base import Quality
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.handle import KVHandle


@dataclass(frozen=True)
class Memory:
    """Bytes that a prefilled cache occupies, measured from outside the cache.

    Attributes:
        plain, compressed: growth of the process's live tensor memory (on CUDA: of the allocator),
            in bytes.
        stats: what the cache itself reports.
    """

    plain: int
    compressed: int
    stats: CacheStats

    @property
    def measured_ratio(self) -> float:
        """fp16 bytes of the uncompressed cache over the measured growth."""
        return self.stats.fp16_nbytes / self.compressed


@torch.no_grad()
def memory(
    model: Any, input_ids: Tensor, quality: Quality = "balanced", **overrides: Any
) -> Memory:
    """Prefill a plain and a compressed cache and compare live memory before and after.

    Example:
        >>> from nexusquant import evaluate
        >>> result = evaluate.memory(model, input_ids, quality="high")
        >>> abs(result.compressed / result.stats.nbytes - 1) < 0.01
        True
    """
    grown = []
    # What the first cache of a process makes and keeps: code tables, the model's profile.
    first = NexusCache(model, quality, **overrides)
    model(input_ids, **cache_argument(model, first), use_cache=True)
    cache: Any = None
    for make in (
        lambda: plain_cache(model),
        lambda: NexusCache(model, quality, **overrides),
    ):
        cache = None
        before = _live_bytes(model.device)
        cache = make()
        model(input_ids, **cache_argument(model, cache), use_cache=True)
        grown.append(_live_bytes(model.device) - before)
    return Memory(grown[0], grown[1], cache_stats(cache))


def _live_bytes(device: torch.device) -> int:
    """Bytes of all live tensor storages (CPU), or what the CUDA allocator handed out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not issubclass(type(thing), KVHandle):
            storage = thing.untyped_storage()
            try:
                storages[storage.data_ptr()] = storage.nbytes()
            except RuntimeError:  # torch.compile keeps tensors that have no memory
                continue
    return sum(storages.values())
