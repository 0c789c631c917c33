"""Reading text with a model for what its attention shows: the work behind every calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant.config import CompressionConfig
from nexusquant.hf.cache import compact_layers, text_config
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import Collector
from nexusquant.hf.transformers_private import cache_argument


@torch.no_grad()
def show(
    model: Any,
    pieces: Sequence[Tensor],
    collector: Collector,
    report: Callable[[str], None] = lambda step: None,
) -> int:
    """Let a model read pieces (1, tokens) of text, each by itself, while a collector looks.

    Returns:
        Tokens read.
    """
    config = CompressionConfig(codec="exact", rope_page=collector.page)
    device = "cpu" if model.device.type == "meta" else model.device  # offloaded: hooks move inputs
    with outside_blocks(model):
        for index, ids in enumerate(pieces):
            report(f"piece {index + 1} of {len(pieces)}, {ids.shape[1]} tokens")
            cache = DynamicCache(config=text_config(model))
            compact_layers(cache, model, config, Notices(), collector)
            read_prompt(model, ids.to(device), cache)
    return sum(ids.shape[1] for ids in pieces)


def read_prompt(model: Any, ids: Tensor, cache: Any) -> None:
    """Fill a cache with the tokens `ids` (batch, tokens)."""
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # the others cost gigabytes
    model(ids, **cache_argument(model, cache), use_cache=True, **last)
