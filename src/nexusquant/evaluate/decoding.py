"""Time and size while tokens are fed one by one behind a prefix."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.evaluate.base import Quality, check_prefix
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.cache_names import cache_argument


@dataclass(frozen=True)
class Decoding:
    """Time and size while tokens are fed one by one behind a prefix.

    Attributes:
        prefill_seconds: for the prefix.
        step_seconds: median over the further tokens.
        after_prefill, after_steps: measured size of the cache at either point; decoded tokens wait
            uncoded until a block of them is compressed.
    """

    prefill_seconds: float
    step_seconds: float
    after_prefill: CacheStats
    after_steps: CacheStats


@torch.no_grad()
def decoding(
    model: Any, input_ids: Tensor, prefix: int, quality: Quality | None, **overrides: Any
) -> Decoding:
    """Prefill `prefix` tokens of `input_ids` (1, tokens), then feed the rest one by one.

    Args:
        quality: None for the uncompressed cache, as the baseline.

    Raises:
        ConfigError: no token behind the prefix, or more than one row.

    Example:
        >>> from nexusquant import evaluate
        >>> result = evaluate.decoding(model, input_ids[:, :64], 60, "max")
        >>> result.after_steps.tokens
        64
    """
    check_prefix(input_ids, prefix, 1)
    cache: Any = plain_cache(model) if quality is None else NexusCache(model, quality, **overrides)
    prefill = _timed(model, input_ids[:, :prefix], cache)
    after_prefill = cache_stats(cache)
    tokens = input_ids[:, prefix:].split(1, dim=1)
    steps = [_timed(model, token, cache) for token in tokens]
    return Decoding(prefill, median(steps), after_prefill, cache_stats(cache))


def _timed(model: Any, input_ids: Tensor, cache: Any) -> float:
    start = time.perf_counter()
    model(input_ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    return time.perf_counter() - start
