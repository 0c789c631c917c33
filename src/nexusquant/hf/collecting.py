"""Reading text with a model for what its attention shows: the work behind every calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nexusquant.compressor import Chunk
from nexusquant.config import CompressionConfig
from nexusquant.errors import ProfileError
from nexusquant.frame import KeyFrame
from nexusquant.hf.cache import compact_layers, text_config
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import ProfileBook, chunk_statistics
from nexusquant.math.e8 import GROUP
from nexusquant.profile import Profile
from nexusquant.residual import OutputSide
from nexusquant.sampling import CALIBRATION
from nexusquant.statistics import LayerStatistics


class Collector(ProfileBook):
    """Gathers statistics over several texts instead; knows no profile meanwhile."""

    def __init__(self, model: nn.Module, page: int) -> None:
        super().__init__(model, page)
        self.statistics: dict[int, list[LayerStatistics]] = {}

    def obtain(
        self, chunk: Chunk, frame: KeyFrame, sinks: int, output: Callable[[], OutputSide] | None
    ) -> Profile | None:
        """Adds the chunk's statistics; of layers with a short window, few tokens of every text."""
        dims = chunk.keys.shape[-1], chunk.values.shape[-1]
        if output is not None and chunk.queries is not None and not any(d % GROUP for d in dims):
            statistics = chunk_statistics(chunk, frame, sinks, output(), CALIBRATION)
            if statistics is not None:
                self.statistics.setdefault(chunk.layer_idx, []).append(statistics)
        return None

    def profile_of(self, model: nn.Module, source: str, tokens: int) -> Profile:
        """The profile of everything seen.

        Raises:
            ProfileError: nothing was seen.
        """
        if not self.statistics:
            raise ProfileError(
                "no text reached an attention layer of this model that can be compressed, so there"
                " is nothing to build a profile from."
            )
        layers = {
            index: LayerStatistics.mean(parts).profile()
            for index, parts in sorted(self.statistics.items())
        }
        return Profile(fingerprint(model), self.page, source, tokens, layers, True)


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
