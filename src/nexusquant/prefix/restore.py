"""Decoded prefixes as caches that go on generating."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache

from nexusquant.compressor import Stored
from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.hf.cache import NexusCache, plain_cache
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.tail import Call, Tail
from nexusquant.prefix.decoded import Decoded
from nexusquant.prefix.rotary import begin


def stock_cache(decoded: Decoded, model: nn.Module) -> DynamicCache:
    """An uncompressed cache of transformers."""
    cache = plain_cache(model)
    for index, source in enumerate(decoded.layers):
        cache.update(source.keys[None], source.values[None], index)
        layer: Any = cache.layers[index]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = decoded.tokens
    return cache


def live_cache(
    decoded: Decoded,
    model: nn.Module,
    quality: str | CompressionConfig,
    profile: ProfileLike = None,
) -> NexusCache:
    """A compressed cache. Nothing of the prefix is evicted, as its queries are not known.

    Raises:
        UnsupportedError: a layer that is not one of plain attention.
    """
    cache = NexusCache(model, quality, profile=profile)
    if cache.config.max_tokens is not None:
        raise UnsupportedError(
            "max_tokens needs the queries of a prompt, which a stored prefix has not: load it"
            " without, or with quality=None."
        )
    begin(cache, model, decoded.tokens)
    for index, source in enumerate(decoded.layers):
        layer = cache.layers[index]
        if not isinstance(layer, CompactLayer):
            raise UnsupportedError(
                f"layer {index} ({type(layer).__name__}) cannot take a stored prefix: load it with"
                " quality=None."
            )
        layer.stored, layer.length = Stored(), decoded.tokens
        layer.tail = Tail(source.keys[None], source.values[None])
        layer.absorb(Call(layer.tail.keys[:, :, :0], None, 1.0, None))
    return cache
