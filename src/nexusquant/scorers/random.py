"""Uniform noise: the control that every other scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs


@dataclass(frozen=True)
class Random:
    """Noise that depends on `seed`, `layer_idx` and the shape alone, the same on every device."""

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32 in [0, 1)."""
        # A private CPU generator: the caller's random state stays as it was.
        seed = (inputs.seed * 1_000_003 + inputs.layer_idx) % 2**63
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(inputs.keys.shape[:3], generator=generator, dtype=torch.float32)
        return noise.to(inputs.keys.device)
