"""Key norm (Devoto et al. 2024, arXiv 2406.11430): keys of low norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs


@dataclass(frozen=True)
class KeyNorm:
    """Minus the L2 norm of the key. Needs no queries and costs next to nothing."""

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32, never positive."""
        wide = torch.promote_types(inputs.keys.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(inputs.keys, dim=-1, dtype=wide)
        return -norm.float()
