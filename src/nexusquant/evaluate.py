"""Measuring what compression costs: divergence from the full model, loss per domain, memory.

Everything is teacher-forced over a compressed prefix, so the scored tokens really see codes.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import CacheStats
from nexusquant.config import CompressionConfig
from nexusquant.errors import ConfigError
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.handle import KVHandle

Quality = str | CompressionConfig
DEFAULT_PRESETS = ("lossless", "high", "balanced", "max")


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
    _check_prefix(input_ids, prefix, 2)
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
    model(input_ids[:, :prefix], past_key_values=cache, use_cache=True)
    stats = cache_stats(cache)
    logits = model(input_ids[:, prefix:], past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), -1), stats


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
    _check_prefix(input_ids, prefix, 1)
    cache: Any = plain_cache(model) if quality is None else NexusCache(model, quality, **overrides)
    prefill = _timed(model, input_ids[:, :prefix], cache)
    after_prefill = cache_stats(cache)
    tokens = input_ids[:, prefix:].split(1, dim=1)
    steps = [_timed(model, token, cache) for token in tokens]
    return Decoding(prefill, median(steps), after_prefill, cache_stats(cache))


def _timed(model: Any, input_ids: Tensor, cache: Any) -> float:
    start = time.perf_counter()
    model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    return time.perf_counter() - start


def _check_prefix(input_ids: Tensor, prefix: int, behind: int) -> None:
    if input_ids.ndim != 2 or len(input_ids) != 1 or not 0 < prefix <= input_ids.shape[1] - behind:
        raise ConfigError(
            f"need input_ids of one row with at least {behind} tokens behind the prefix of"
            f" {prefix}; got shape {tuple(input_ids.shape)}."
        )


@dataclass(frozen=True)
class PresetLoss:
    """One row of the domain test: a preset over all texts.

    Attributes:
        preset: its name.
        loss: mean continuation loss, nats per token.
        full_loss: the uncompressed model's on the same tokens.
        lossless_loss: the `lossless` preset's on the same tokens.
        kl: mean KL from the uncompressed model.
        ratio: mean measured compression ratio.
        texts: texts scored; shorter ones were left out.
    """

    preset: str
    loss: float
    full_loss: float
    lossless_loss: float
    kl: float
    ratio: float
    texts: int

    @property
    def perplexity_change(self) -> float:
        """Relative perplexity change against `lossless`, 0.01 = +1%."""
        return math.expm1(self.loss - self.lossless_loss)

    def __str__(self) -> str:
        return (
            f"{self.preset:12s} loss {self.loss:.4f}  PPL {100 * self.perplexity_change:+6.2f}%"
            f" against lossless, {100 * math.expm1(self.loss - self.full_loss):+6.2f}% against"
            f" uncompressed  KL {self.kl:.4f}  {self.ratio:5.1f}x  {self.texts} texts"
        )


def domain_test(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    presets: Sequence[str] = DEFAULT_PRESETS,
    *,
    max_tokens: int = 2048,
    continuation: float = 0.25,
) -> list[PresetLoss]:
    """Which preset do *your* texts bear? Mean continuation loss per preset, against lossless.

    Args:
        texts: 20 to 50 are enough; those under 64 tokens are left out.
        max_tokens: longer texts are cut.
        continuation: share of each text that is scored, behind a compressed prefix.

    Raises:
        ConfigError: no text is long enough.

    Example:
        >>> from nexusquant import evaluate
        >>> rows = evaluate.domain_test(model, tokenizer, ["some text of your own " * 40])
        >>> [row.preset for row in rows]
        ['lossless', 'high', 'balanced', 'max']
    """
    encoded = [tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens] for text in texts]
    usable = [ids.to(model.device) for ids in encoded if ids.shape[1] >= 64]
    if not usable:
        raise ConfigError(f"none of the {len(encoded)} texts has 64 tokens or more.")
    results = {
        preset: [
            divergence(model, ids, int(ids.shape[1] * (1 - continuation)), preset) for ids in usable
        ]
        for preset in dict.fromkeys(("lossless", *presets))
    }
    lossless = mean(r.loss for r in results["lossless"])
    return [
        PresetLoss(
            preset,
            mean(r.loss for r in results[preset]),
            mean(r.full_loss for r in results[preset]),
            lossless,
            mean(r.kl for r in results[preset]),
            mean(r.stats.compression_ratio for r in results[preset]),
            len(usable),
        )
        for preset in presets
    ]


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
    model(input_ids[:, :64], past_key_values=NexusCache(model, quality, **overrides))  # code tables
    cache: Any = None
    for make in (
        lambda: plain_cache(model),
        lambda: NexusCache(model, quality, **overrides),
    ):
        cache = None
        before = _live_bytes(model.device)
        cache = make()
        model(input_ids, past_key_values=cache, use_cache=True)
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
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
