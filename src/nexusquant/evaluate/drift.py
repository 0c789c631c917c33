"""Does the error grow while a long answer is decoded, its own tokens compressed as they go?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.errors import ConfigError
from nexusquant.evaluate.base import Quality, check_prefix
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.cache_names import cache_argument

_CHUNK = 64  # tokens whose full distributions exist at once


@dataclass(frozen=True)
class DriftBucket:
    """Mean divergence over some of the decoded tokens.

    Attributes:
        start, stop: first decoded token and the one after the last, counted from the prefix.
        kl: mean KL(full || compressed), nats per token, decoded tokens compressed as they go.
        prefill_kl: the same with a compressed prefix but decoded tokens kept exact.
    """

    start: int
    stop: int
    kl: float
    prefill_kl: float


@dataclass(frozen=True)
class Drift:
    """Divergence along a long decode.

    Texts are not equally hard all along: compare `slope` with `prefill_slope`, which knows the same
    text but no compressed answer.

    Attributes:
        buckets: consecutive, of equal size (up to one token).
        after_prefill, after_steps: measured size of the cache at either point.
    """

    buckets: tuple[DriftBucket, ...]
    after_prefill: CacheStats
    after_steps: CacheStats

    @property
    def kl(self) -> float:
        """Mean over all steps, nats per token."""
        return _mean([(b.stop - b.start, b.kl) for b in self.buckets])

    @property
    def prefill_kl(self) -> float:
        """Mean over all steps with the decoded tokens kept exact."""
        return _mean([(b.stop - b.start, b.prefill_kl) for b in self.buckets])

    @property
    def slope(self) -> float:
        """KL of the last bucket over that of the first; nan if the first is 0."""
        return _over(self.buckets[-1].kl, self.buckets[0].kl)

    @property
    def prefill_slope(self) -> float:
        """The same with the decoded tokens kept exact."""
        return _over(self.buckets[-1].prefill_kl, self.buckets[0].prefill_kl)


@torch.no_grad()
def drift(
    model: Any,
    input_ids: Tensor,
    prefix: int,
    quality: Quality = "balanced",
    *,
    steps: int = 2000,
    buckets: int = 8,
    report: Callable[[str], None] = lambda step: None,
    **overrides: Any,
) -> Drift:
    """Prefill `prefix` tokens into a compressed cache, feed `steps` more one by one, and compare.

    The uncompressed model reads the same tokens beside it in chunks, so that the distributions of
    only one chunk are held.

    Args:
        input_ids: (1, tokens) int64, of which the first prefix + steps are used.
        buckets: parts of equal size that the steps are averaged over.
        report: called with a line of text as the steps advance.

    Raises:
        ConfigError: fewer than `steps` tokens behind the prefix, more than one row, or not
            2 <= buckets <= steps.

    Example:
        >>> from nexusquant import evaluate
        >>> result = evaluate.drift(model, input_ids, 200, "high", steps=100, buckets=2)
        >>> [(bucket.start, bucket.stop) for bucket in result.buckets]
        [(0, 50), (50, 100)]
        >>> result.after_steps.tokens
        300
    """
    check_prefix(input_ids, prefix, steps)
    if not 2 <= buckets <= steps:
        raise ConfigError(f"buckets={buckets}: must be from 2 to the number of steps, {steps}.")
    plain, cache = plain_cache(model), NexusCache(model, quality, **overrides)
    for each in (plain, cache):
        _logits(model, input_ids[:, :prefix], each, 1)
    after_prefill = cache_stats(cache)
    exact_tail = copy.deepcopy(cache)
    exact_tail.activate_past_recording()  # until a `crop` that never comes, tokens stay uncoded
    divergences = []
    for start in range(0, steps, _CHUNK):
        tokens = input_ids[:, prefix + start : prefix + min(start + _CHUNK, steps)]
        full = _logits(model, tokens, plain)
        ours = torch.cat([_logits(model, token, cache) for token in tokens.split(1, dim=1)])
        held = _logits(model, tokens, exact_tail)
        divergences.append(torch.stack([_kl(full, ours), _kl(full, held)]))
        report(f"token {start + tokens.shape[1]:,} of {steps:,}")
    parts = torch.cat(divergences, dim=1).cpu().tensor_split(buckets, dim=1)
    found, start = [], 0
    for part in parts:
        kl, prefill_kl = part.mean(1).tolist()
        found.append(DriftBucket(start, start + part.shape[1], kl, prefill_kl))
        start += part.shape[1]
    return Drift(tuple(found), after_prefill, cache_stats(cache))


def _logits(model: Any, tokens: Tensor, cache: Any, keep: int = 0) -> Tensor:
    """Log-probabilities (tokens, vocab) fp32 after the last `keep` tokens, 0 for all of them."""
    out = model(tokens, **cache_argument(model, cache), use_cache=True, logits_to_keep=keep)
    return torch.log_softmax(out.logits[0].float(), -1)


def _kl(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of log-probabilities (tokens, vocab), fp64 (tokens,)."""
    return (full.exp() * (full - other)).sum(-1).double()


def _mean(weighted: list[tuple[int, float]]) -> float:
    return sum(count * x for count, x in weighted) / sum(count for count, _ in weighted)


def _over(last: float, first: float) -> float:
    return last / first if first else float("nan")
