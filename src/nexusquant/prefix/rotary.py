"""Which rotation a model gives to every position, found by showing it one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nexusquant.config import CompressionConfig
from nexusquant.frame import KeyFrame
from nexusquant.hf.cache import compact_layers, text_config
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import ProfileBook
from nexusquant.hf.quirks import attention_modules, layer_of
from nexusquant.math.rope import RopeTable, Span


@dataclass(frozen=True)
class LayerRotary:
    """Of one layer.

    Attributes:
        frame: keys without RoPE; where frequencies are not known, keys as the model rotates them.
        scaling: factor on the logits, None if the module does not say.
        device, dtype: of the layer's cache.
    """

    frame: KeyFrame
    scaling: float | None
    device: torch.device
    dtype: torch.dtype

    def enter(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Keys (heads, tokens, dim) at `slots` (tokens,) as rotated to keys without RoPE, fp32."""
        at = slots.view(1, 1, -1).to(self.device)
        return self.frame.enter(keys[None].to(self.device), at)[0].cpu()

    def leave(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Inverse of `enter`."""
        at = slots.view(1, 1, -1).to(self.device)
        return self.frame.leave(keys[None].to(self.device), at)[0].cpu()


@torch.no_grad()
def learn_rotary(model: nn.Module, tokens: int, cache: DynamicCache | None = None) -> None:
    """Record the rows of positions 0 to `tokens` - 1 in the layers of an empty compact cache.

    Tables whose frequencies depend on the length of the text (dynamic NTK) are those of one token:
    then keys are not entirely free of RoPE, and coded in a few bits more, but just as well.
    """
    cache = compact_cache(model) if cache is None else cache
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded
    with outside_blocks(model):
        model(torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache)
    done: set[int] = set()
    for layer in cache.layers:
        if not isinstance(layer, CompactLayer) or layer.rope is None:
            continue
        if id(layer.rope.table) not in done:
            done.add(id(layer.rope.table))
            _extend(layer.rope.table, tokens)


def _extend(table: RopeTable, tokens: int) -> None:
    span = table.spans[-1]
    if span.frequencies is None:
        return
    positions = torch.arange(tokens, dtype=torch.int32, device=span.frequencies.device)[None]
    table.spans = [Span(positions, span.frequencies, span.scaling, span.tiling)]


def compact_cache(model: nn.Module) -> DynamicCache:
    """An empty cache of `model` whose layers record the rotation of their keys."""
    cache = DynamicCache(config=text_config(model))
    config = CompressionConfig(codec="exact", rope_page=1)
    compact_layers(cache, model, config, Notices(), ProfileBook(model, 1))
    return cache


def rotary_of(model: nn.Module, tokens: int) -> dict[int, LayerRotary]:
    """Per attention layer, for positions 0 to `tokens` - 1."""
    cache = compact_cache(model)
    learn_rotary(model, tokens, cache)
    scaling: dict[int | None, float] = {}
    for _, module in attention_modules(model):
        factor: Any = getattr(module, "scaling", None)
        if isinstance(factor, float):
            scaling[layer_of(module)] = factor
    found = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompactLayer):
            table = layer.rope.table if layer.rope is not None else None
            known = table is not None and table.length >= tokens
            frame = KeyFrame(table if known else None, 1)
            found[index] = LayerRotary(frame, scaling.get(index), layer.device, layer.dtype)
    return found
