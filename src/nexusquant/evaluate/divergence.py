"""How far the next-token distributions behind a compressed prefix are from the full model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.evaluate.base import Quality, check_prefix
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.transformers_private import cache_argument


@dataclass(frozen=True)
class Divergence:
    """How far a compressed continuation is from the uncompressed one.

    Attributes:
        kl: mean KL(full || compressed) of the next-token distributions, nats per token.
        loss, full_loss: mean negative log-likelihood of the continuation, nats per token.
        top1: share of positions with the same most likely token.
        stats: measured size of the cache after the prefix.
    """

    kl: float
    loss: float
    full_loss: float
    top1: float
    stats: CacheStats

    @property
    def perplexity_change(self) -> float:
        """Relative perplexity change, 0.01 = +1%."""
        return math.expm1(self.loss - self.full_loss)


@torch.no_grad()
def divergence(
    model: Any, input_ids: Tensor, prefix: int, quality: Quality = "balanced", **overrides: Any
) -> Divergence:
    """Prefill `prefix` tokens into a compressed cache and score the rest of `input_ids`.

    Args:
        input_ids: (1, tokens) int64.
        prefix: tokens to compress; at least two must remain.

    Raises:
        ConfigError: fewer than two tokens behind the prefix, or more than one row.

    Example:
        >>> from nexusquant import evaluate
        >>> result = evaluate.divergence(model, input_ids, prefix=48, quality="high")
        >>> result.kl >= 0 and result.stats.compression_ratio > 1
        True
    """
    check_prefix(input_ids, prefix, 2)
    full, _ = _continue(model, input_ids, prefix, plain_cache(model))
    cache = NexusCache(model, quality, **overrides)
    compressed, stats = _continue(model, input_ids, prefix, cache)
    target = input_ids[0, prefix + 1 :, None]
    return Divergence(
        kl=(full.exp() * (full - compressed)).sum(-1).mean().item(),
        loss=-compressed[:-1].gather(1, target).mean().item(),
        full_loss=-full[:-1].gather(1, target).mean().item(),
        top1=(full.argmax(-1) == compressed.argmax(-1)).float().mean().item(),
        stats=stats,
    )


def _continue(model: Any, input_ids: Tensor, prefix: int, cache: Any) -> tuple[Tensor, CacheStats]:
    """Log-probabilities after the prefix (tokens - prefix, vocab), and the cache's size then."""
    model(input_ids[:, :prefix], **cache_argument(model, cache), use_cache=True)
    stats = cache_stats(cache)
    logits = model(input_ids[:, prefix:], **cache_argument(model, cache), use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), -1), stats
