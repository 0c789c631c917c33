"""Decoded prefixes as caches that go on generating."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nexusquant.config import CompressionConfig
from nexusquant.entropy.profile import QueryMoments, StoreProfile
from nexusquant.errors import UnsupportedError
from nexusquant.hf.cache import NexusCache, plain_cache
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.second_pass import reads_twice
from nexusquant.hf.tail import Call, Tail
from nexusquant.prefix.decoded import Decoded
from nexusquant.prefix.rotary import CachedLayer, begin, cached_layers
from nexusquant.stored import Stored

_QUERIES = 256
"""Enough for their mean and covariance, which is what most scorers go by."""


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
    store_profile: StoreProfile,
    quality: str | CompressionConfig,
    profile: ProfileLike = None,
) -> NexusCache:
    """A compressed cache.

    The queries of the prompt are gone. What matters, and is not evicted, is decided by others that
    are distributed as the storage profile says.

    Raises:
        UnsupportedError: a layer that is not one of plain attention.
    """
    cache = NexusCache(model, quality, profile=profile)
    if cache._profiles.wanted and cache._profiles.profile is None:
        first: Any = cache.layers[0]
        first.notices.warn(
            "this model has no profile for live caches (nexusquant calibrate), and a stored prefix"
            " cannot build one: it is coded without, and less well."
        )
    cached = cached_layers(model)
    begin(cache, model, decoded.tokens)
    for index, source in enumerate(decoded.layers):
        layer = cache.layers[index]
        if not isinstance(layer, CompactLayer):
            raise UnsupportedError(
                f"layer {index} ({type(layer).__name__}) cannot take a stored prefix: load it"
                " without a quality, as an uncompressed cache."
            )
        layer.stored, layer.length = Stored(), decoded.tokens
        layer.tail = Tail(source.keys[None], source.values[None])
        queries = _queries(store_profile.queries[index], cached[index], decoded.tokens)
        if reads_twice(cache.config, queries.shape[2]):  # nobody reads the text again
            queries = queries[:, :, :0]
        layer.absorb(Call(queries, None, cached[index].logit_scale, None))
    return cache


def _queries(moments: QueryMoments, layer: CachedLayer, tokens: int) -> Tensor:
    """What queries of the last positions may be like, (1, query_heads, n, dim)."""
    heads, dim = moments.mean.shape
    count = min(tokens, _QUERIES)
    noise = torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(0))
    spread, basis = torch.linalg.eigh(moments.covariance.float())
    root = basis * spread.clamp(min=0).sqrt()[:, None]
    queries = moments.mean[:, None] + noise @ root.mT
    return layer.leave(queries, tokens - count)[None].to(layer.device, layer.dtype)
