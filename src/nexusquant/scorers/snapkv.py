"""SnapKV (Li et al. 2024, arXiv 2404.14469): what the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs, causal_attention


@dataclass(frozen=True)
class SnapKV:
    """Attention that the last `window` queries pay to each candidate, smoothed along the tokens.

    The smoothing keeps whole phrases together. It averages over the valid neighbours only, so that
    neither padding nor the ends of the sequence pull a token down.
    """

    window: int = 64
    kernel: int = 5

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32: votes, pooled, averaged over the GQA group."""
        tokens = inputs.keys.shape[2]
        queries = inputs.queries[:, :, -self.window :]
        votes = causal_attention(
            queries,
            inputs.keys,
            inputs.valid,
            first=tokens - queries.shape[2],
            scaling=inputs.scaling,
            softcap=inputs.softcap,
        )
        votes = votes.sum(3).mean(2)
        # Padding has no votes, so the mean over valid neighbours is a quotient of two poolings.
        valid = inputs.valid_mask()[:, None].float()
        pooled = self._pool(votes) / self._pool(valid).clamp_min(1.0 / self.kernel)
        return pooled * valid

    def _pool(self, rows: Tensor) -> Tensor:
        return F.avg_pool1d(rows, self.kernel, stride=1, padding=self.kernel // 2)
