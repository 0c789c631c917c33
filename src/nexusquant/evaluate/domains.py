"""Which preset one's own texts bear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from nexusquant.errors import ConfigError
from nexusquant.evaluate.base import DEFAULT_PRESETS
from nexusquant.evaluate.divergence import divergence


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
