"""Keys and values as the model made them, out of a cache that still has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.sliding import CompactSlidingLayer
from nexusquant.hf.transformers_private import DynamicLayer, DynamicSlidingWindowLayer
from nexusquant.tokens import ExactTokens


@dataclass(frozen=True)
class LayerSource:
    """One layer of one sequence.

    Attributes:
        keys, values: (kv_heads, tokens, dim), keys as rotated, of the last positions.
        start: position of the first of them.
    """

    keys: Tensor
    values: Tensor
    start: int


def has_source(cache: Any) -> bool:
    """Whether the cache still has keys and values as the model made them."""
    return all(not isinstance(x, CompactLayer) or x.config.codec == "exact" for x in cache.layers)


def sources(cache: Any) -> list[LayerSource]:
    """All layers.

    Raises:
        UnsupportedError: an empty cache, several sequences, tokens evicted, or layers that are no
            plain attention.
    """
    if not cache.layers or cache.get_seq_length() == 0:
        raise UnsupportedError("this cache is empty: there is nothing to save.")
    found = [_source(index, layer) for index, layer in enumerate(cache.layers)]
    ends = {x.start + x.keys.shape[1] for x in found}
    if len(ends) > 1:
        raise UnsupportedError(f"the layers of this cache end at different tokens: {sorted(ends)}.")
    return found


def _source(index: int, layer: Any) -> LayerSource:
    kind = type(layer)  # others hold more: states of linear attention, quantized tokens
    if kind in (CompactLayer, CompactSlidingLayer):
        keys, values, length = _exact(index, layer)
    elif kind in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
        keys, values, length = layer.keys, layer.values, int(layer.get_seq_length())
    else:
        plain = isinstance(layer, DynamicLayer) and not layer.is_initialized
        what = "is empty" if plain else "holds other things than plain keys and values"
        raise UnsupportedError(
            f"layer {index} ({type(layer).__name__}) {what}; codec='raw' saves compressed caches"
            " of any model."
        )
    if len(keys) != 1:
        raise UnsupportedError(
            f"this cache holds {len(keys)} sequences; save one at a time"
            " (cache.batch_select_indices picks rows)."
        )
    return LayerSource(keys[0], values[0], length - keys.shape[2])


def _exact(index: int, layer: CompactLayer) -> tuple[Tensor, Tensor, int]:
    parts = list(layer.stored.parts())
    if layer.tail is None:
        raise UnsupportedError(f"layer {index} is empty: there is nothing to save.")
    held = layer.length - layer.tail.count
    whole = all(isinstance(part, ExactTokens) and part.slots.stored is None for part in parts)
    stored = sum(part.slots.count for part in parts)
    if not whole or (parts and parts[-1].slots.stop != held) or stored < held - layer.first_visible:
        raise UnsupportedError(
            f"layer {index} has evicted or compressed tokens: codec='raw' saves such caches."
        )
    keys, values = (
        torch.cat([*(getattr(part, name) for part in parts), getattr(layer.tail, name)], 2)
        for name in ("keys", "values")
    )
    return keys, values, layer.length
