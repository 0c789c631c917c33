"""What a model's layers do to their caches, found by showing it a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.frame import KeyFrame
from nexusquant.hf.cache import compact_layers, text_config
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import ProfileBook
from nexusquant.hf.quirks import attention_modules, layer_of
from nexusquant.hf.sliding import CompactSlidingLayer
from nexusquant.math.rope import RopeTable, Span

_SHOWN = 16
"""Tokens: rows of position 0 are the same whatever the frequencies and their order."""


@dataclass(frozen=True)
class CachedLayer:
    """One attention layer of a model.

    Attributes:
        table: how its keys are rotated; None if they are not, or frequencies are not known.
        shape: (kv_heads, key dim, value dim).
        window: tokens that a query sees, its own included; None for all.
        scaling: factor on the logits, None if the module does not say.
        device, dtype: of its cache.
    """

    table: RopeTable | None
    shape: tuple[int, int, int]
    window: int | None
    scaling: float | None
    device: torch.device
    dtype: torch.dtype

    @property
    def logit_scale(self) -> float:
        """Factor on the logits, the usual one if the module says none."""
        return self.shape[1] ** -0.5 if self.scaling is None else self.scaling

    def enter(self, keys: Tensor, first: int) -> Tensor:
        """Keys (heads, tokens, dim) of positions from `first` on, without RoPE, fp32."""
        frame, slots = self._frame(first, keys.shape[1])
        return frame.enter(keys[None].to(self.device), slots)[0].cpu()

    def leave(self, keys: Tensor, first: int) -> Tensor:
        """Inverse of `enter`."""
        frame, slots = self._frame(first, keys.shape[1])
        return frame.leave(keys[None].to(self.device), slots)[0].cpu()

    def ahead(self, tokens: int, count: int) -> Tensor | None:
        """Mean rotation of the `count` positions behind `tokens`, (dim, dim); None without RoPE."""
        if self.table is None:
            return None
        turn = _moved(self.table, tokens - 1, 1).average_rotation(count, self.shape[1])
        return None if turn is None else turn[0].cpu()

    def _frame(self, first: int, tokens: int) -> tuple[KeyFrame, Tensor]:
        table = None if self.table is None else _moved(self.table, first, tokens)
        return KeyFrame(table, 1), torch.arange(tokens, device=self.device).view(1, 1, -1)


def _moved(table: RopeTable, first: int, tokens: int) -> RopeTable:
    """The same rotation, of positions from `first` on."""
    moved, span = RopeTable(table.apply), table.spans[-1]
    assert span.frequencies is not None
    device = span.frequencies.device
    positions = torch.arange(first, first + tokens, dtype=torch.int32, device=device)[None]
    moved.spans = [Span(positions, span.frequencies, span.scaling, span.tiling)]
    return moved


@torch.no_grad()
def cached_layers(model: nn.Module) -> dict[int, CachedLayer]:
    """Every layer of the model's cache.

    Tables whose frequencies depend on the length of the text (dynamic NTK) are those of a short
    one: then keys are not entirely free of RoPE, and coded in a few bits more, but just as well.

    Raises:
        UnsupportedError: layers that are no plain attention.
    """
    cache = DynamicCache(config=text_config(model))
    config = CompressionConfig(codec="exact", rope_page=1)
    compact_layers(cache, model, config, Notices(), ProfileBook(model, 1))
    _show(model, cache)
    scaling: dict[int | None, float] = {}
    for _, module in attention_modules(model):
        factor: Any = getattr(module, "scaling", None)
        if isinstance(factor, float):
            scaling[layer_of(module)] = factor
    found = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (CompactLayer, CompactSlidingLayer) or layer.tail is None:
            raise UnsupportedError(
                f"layer {index} of this model ({type(layer).__name__}) keeps other things than keys"
                " and values: codec='raw' saves compressed caches of any model."
            )
        keys, values = layer.tail.keys, layer.tail.values
        table = layer.rope.table if layer.rope is not None else None
        known = table is not None and table.spans[-1].frequencies is not None
        found[index] = CachedLayer(
            table if known else None, (keys.shape[1], keys.shape[3], values.shape[3]),
            getattr(layer, "sliding_window", None), scaling.get(index), layer.device, layer.dtype,
        )  # fmt: skip
    return found


def begin(cache: DynamicCache, model: nn.Module, tokens: int) -> None:
    """Let the layers of an empty compact cache know the rotation of positions up to `tokens`."""
    layers = [layer for layer in cache.layers if isinstance(layer, CompactLayer)]
    for layer in layers:
        layer.record_past = True  # compress nothing yet
    _show(model, cache)
    for layer in layers:
        layer.record_past, layer.deferred = False, None
        if layer.rope is not None and layer.rope.table.spans[-1].frequencies is None:
            layer.rope = None  # keys stay as they are rotated
        elif layer.rope is not None and layer.rope.owner:
            layer.rope.table.spans = _moved(layer.rope.table, 0, tokens).spans


@torch.no_grad()
def _show(model: nn.Module, cache: DynamicCache) -> None:
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded
    ids = torch.zeros(1, _SHOWN, dtype=torch.long, device=device)
    with outside_blocks(model):
        model(ids, **cache_argument(model, cache), use_cache=True)
