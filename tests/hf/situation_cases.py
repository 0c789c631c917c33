"""Settings that many tests are about, and ours beside stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache

EXACT = CompressionConfig(codec="exact", residual_length=8)
CODED = CompressionConfig(residual_length=8, recent=4)
HALF = CODED.replace(evict_ratio=0.5)
SETTINGS = pytest.mark.parametrize("settings", [EXACT, CODED, HALF], ids=["exact", "all", "half"])
CODES = pytest.mark.parametrize("settings", [CODED, HALF], ids=["all", "half"])
FULL_AND_SLIDING = pytest.mark.parametrize("kind", ["llama", "gemma3"])


def close(ours: Tensor, stock: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, stock, rtol=0, atol=tolerance)


def pair(model: Any, settings: CompressionConfig = EXACT) -> tuple[NexusCache, DynamicCache]:
    """Ours and stock."""
    return NexusCache(model, settings), DynamicCache(config=model.config)
