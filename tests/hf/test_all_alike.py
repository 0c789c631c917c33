"""Prompts of one token again and again, and what follows them."""

from __future__ import annotations

import pytest
import torch

from nexusquant import CompressionConfig, NexusCache
from tests.hf.models import feed, prompt, tiny

EXACT = CompressionConfig(codec="exact")


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt_neox"])
def test_ordinary_text_behind_a_run_of_one_token(kind: str, dtype: torch.dtype, turns: int) -> None:
    model = tiny(kind, seed=1).to(dtype)
    for run, more in ((370, 30), (100, 100), (200, 1)):
        ids = torch.cat([torch.full((1, run), 7), prompt(more)], 1)
        caches = [NexusCache(model, settings) for settings in ("lossless", EXACT)]
        for cache in caches:
            feed(model, cache, ids, run if turns == 2 else run + more)
        ours, exact = (feed(model, cache, prompt(60), 1) for cache in caches)
        assert (ours - exact)[:, -1].abs().max() < 0.5 * exact.abs().max()
