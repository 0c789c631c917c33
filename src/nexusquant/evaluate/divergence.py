"""How far the next-token distributions behind a compressed prompt are from the full model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.errors import ConfigError
from nexusquant.evaluate.base import Quality, check_prefix
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.collecting import read_prompt

_CHUNK = 64  # tokens that the uncompressed model reads at once


@dataclass(frozen=True)
class Divergence:
    """How far a compressed continuation is from the uncompressed one.

    Attributes:
        kl: mean KL(full || compressed) of the next-token distributions, nats per token.
        p999: its 99.9th percentile: a few tokens, of those that copy something rare, carry a large
            part of the mean.
        loss, full_loss: mean negative log-likelihood of the continuation, nats per token.
        top1: share of positions with the same most likely token.
        stats: measured size of the cache behind the prefix.
        final: measured size of the cache at the end.
    """

    kl: float
    p999: float
    loss: float
    full_loss: float
    top1: float
    stats: CacheStats
    final: CacheStats

    @property
    def perplexity_change(self) -> float:
        """Relative perplexity change, 0.01 = +1%."""
        return math.expm1(self.loss - self.full_loss)


@torch.no_grad()
def divergence(
    model: Any,
    input_ids: Tensor,
    prefix: int,
    quality: Quality = "balanced",
    *,
    step: int = 1,
    **overrides: Any,
) -> Divergence:
    """Prefill `prefix` tokens into a compressed cache and feed the rest of `input_ids` behind them.

    They are fed one by one, as `generate` does, so what was decoded is compressed, too.

    Args:
        input_ids: (1, tokens) int64.
        prefix: tokens of the prompt; at least two must remain.
        step: tokens per forward pass behind the prefix. More are faster, but then the scored tokens
            see some of each other uncompressed, which no user does.

    Raises:
        ConfigError: fewer than two tokens behind the prefix, more than one row, or a bad `step`.

    Example:
        >>> from nexusquant import evaluate
        >>> result = evaluate.divergence(model, input_ids, prefix=48, quality="high")
        >>> result.kl >= 0 and result.final.compression_ratio > 1
        True
    """
    check_prefix(input_ids, prefix, 2)
    if step < 1:
        raise ConfigError(f"step={step}: must be at least 1.")
    full, _ = _continue(model, input_ids, prefix, plain_cache(model), _CHUNK)
    cache = NexusCache(model, quality, **overrides)
    compressed, stats = _continue(model, input_ids, prefix, cache, step)
    kl = (full.exp() * (full - compressed)).sum(-1)
    target = input_ids[0, prefix + 1 :, None]
    return Divergence(
        kl=kl.mean().item(),
        p999=kl.quantile(0.999).item(),
        loss=-compressed[:-1].gather(1, target).mean().item(),
        full_loss=-full[:-1].gather(1, target).mean().item(),
        top1=(full.argmax(-1) == compressed.argmax(-1)).float().mean().item(),
        stats=stats,
        final=cache_stats(cache),
    )


def _continue(
    model: Any, input_ids: Tensor, prefix: int, cache: Any, step: int
) -> tuple[Tensor, CacheStats]:
    """Log-probabilities after the prefix (tokens - prefix, vocab), and the cache's size then."""
    read_prompt(model, input_ids[:, :prefix], cache)
    stats = cache_stats(cache)
    parts = [
        torch.log_softmax(
            model(some, **cache_argument(model, cache), use_cache=True).logits[0].float(), -1
        )
        for some in input_ids[:, prefix:].split(step, dim=1)
    ]
    return torch.cat(parts), stats
