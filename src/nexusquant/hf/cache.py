"""`NexusCache`: a transformers cache whose layers are compact, and the swap that makes one."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from nexusquant.accounting import CacheStats, storage_bytes
from nexusquant.config import CompressionConfig, resolve_config
from nexusquant.errors import UnsupportedError
from nexusquant.hf.coverage import cross_attention
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.hybrid import CompactHybridLayer, CompactHybridSlidingLayer, LinearStateLayer
from nexusquant.hf.install import Lease
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import ProfileBook, ProfileLike
from nexusquant.hf.refusals import ENCODER_DECODER, refusal
from nexusquant.hf.rope_tables import RopeBook
from nexusquant.hf.sliding import CompactSlidingLayer
from nexusquant.hf.transformers_private import (
    STOCK_HYBRID,
    STOCK_HYBRID_SLIDING,
    STOCK_LINEAR,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    check_transformers,
)
from nexusquant.hf.uncompiled import plain_model
from nexusquant.profile import Profile

compacted: weakref.WeakSet[Cache] = weakref.WeakSet()
"""Caches that went through `compact_layers`, whether or not any layer could be compressed."""


def checked_model(model: nn.Module) -> PreTrainedModel:
    """`model`, or the one that is compiled in it.

    Raises:
        UnsupportedError: it cannot have a compressed cache at all.
    """
    check_transformers()
    model = plain_model(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"expected a transformers model, got {type(model).__name__}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} {ENCODER_DECODER}.")
    if why := refusal(type(model), model.config):
        end = "" if why.endswith(".") else ", so there is nothing to compress."
        raise UnsupportedError(f"{type(model).__name__} {why}{end}")
    return model


def compact_layers(
    cache: Cache,
    model: nn.Module,
    config: CompressionConfig,
    notices: Notices,
    profiles: ProfileBook,
) -> None:
    """Swap the attention layers of an empty `DynamicCache` for compact ones, in place."""
    lease = Lease(model)
    layers = cache.layers or plain_cache(model).layers
    book, mixed = RopeBook(), any(type(layer) in (DynamicLayer, STOCK_HYBRID) for layer in layers)
    swapped: list[Any] = []
    kept: dict[str, int] = {}
    crossed = cross_attention(model.config)
    for index, layer in enumerate(layers):
        new = None if index in crossed else _compact(layer, config, index, notices, mixed)
        if new is None:
            name = type(layer).__name__
            if name != "DummyLayer":  # it holds nothing
                kept[name] = kept.get(name, 0) + 1
            swapped.append(layer)
            continue
        new.lease = lease
        if isinstance(new, CompactLayer):
            new.book, new.profiles = book, profiles
        if getattr(layer, "record_past", False):
            new.activate_past_recording()
        swapped.append(new)
    if kept:
        what = ", ".join(f"{count} {name}" for name, count in sorted(kept.items()))
        notices.warn(f"layers that stay uncompressed in this model: {what}.")
    cache.layers = swapped
    cache.layer_class_to_replicate = None
    compacted.add(cache)


def attach(cache: Cache, model: nn.Module) -> None:
    """Let an unpickled cache be used with `model`, whose copy it was made with.

    Args:
        cache: a `NexusCache` or a cache made in a `nexusquant_evict` block. One that belongs to a
            model already stays as it is.
        model: same weights and config as the model before.

    Raises:
        UnsupportedError: not such a cache, another model, or one that cannot have such a cache.

    Example:
        >>> import pickle
        >>> from nexusquant import NexusCache, attach
        >>> cache = NexusCache(model, quality="high")
        >>> output = model.generate(input_ids, cache=cache, max_new_tokens=8)
        >>> again = pickle.loads(pickle.dumps(cache))
        >>> attach(again, model)
        >>> again.nbytes == cache.nbytes
        True
    """
    layers = [x for x in cache.layers if isinstance(x, (CompactLayer, LinearStateLayer))]
    if not layers:
        raise UnsupportedError(f"expected a compressed cache, got {type(cache).__name__}.")
    leases = {x.lease.fingerprint for x in layers if x.lease is not None and x.lease.detached}
    if not leases:
        return
    model = checked_model(model)
    if leases != {fingerprint(model)}:
        raise UnsupportedError(
            "this cache was made with another model: its weights or its config are different."
        )
    lease = Lease(model)
    for layer in layers:
        layer.lease = lease
        if isinstance(layer, CompactLayer) and layer.profiles is not None:
            layer.profiles.attach(model)


def _compact(
    layer: Any, config: CompressionConfig, index: int, notices: Notices, mixed: bool
) -> Any:
    """Our layer in place of a stock one, None if there is none."""
    kind, ours = type(layer), (config, index, notices)
    if kind is DynamicLayer:
        return CompactLayer(*ours)
    if kind is DynamicSlidingWindowLayer:
        return CompactSlidingLayer(*ours, layer.sliding_window, mixed)
    if kind is STOCK_LINEAR:
        return LinearStateLayer(number_of_states=layer.number_of_states)
    if kind is STOCK_HYBRID:
        return CompactHybridLayer(*ours, number_of_states=layer.number_of_states)
    if kind is STOCK_HYBRID_SLIDING:
        window = layer.sliding_window, mixed
        return CompactHybridSlidingLayer(*ours, *window, number_of_states=layer.number_of_states)
    return None


def text_config(model: Any) -> Any:
    """The config of the decoder, also of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def plain_cache(model: Any) -> DynamicCache:
    """The cache that the model would make for itself."""
    return DynamicCache(config=text_config(model))


def cache_stats(cache: Cache) -> CacheStats:
    """Measured size of any cache, compact or not."""
    layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
    compact = [layer for layer in layers if isinstance(layer, CompactLayer)]
    coded = [layer for layer in compact if layer.stored.count]
    things = [x for layer in compact for x in layer.tensors()]
    others = [vars(layer) for layer in layers if not isinstance(layer, CompactLayer)]
    elements = sum(layer.elements for layer in compact)
    for layer in layers:
        if isinstance(layer, LinearStateLayer):
            elements += layer.elements
        elif not isinstance(layer, CompactLayer):
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                elements += tensor.numel() if tensor is not None else 0
    kept = [_kept(layer) for layer in coded or layers]
    books = {id(layer.profiles): layer.profiles for layer in compact if layer.profiles}
    own = [book.own for book in books.values() if book.own]
    return CacheStats(
        nbytes=storage_bytes(things, others) + sum(profile.nbytes for profile in own),
        elements=elements,
        tokens=max((_length(layer) for layer in layers), default=0),
        kept_tokens=sum(kept) / len(kept) if kept else 0.0,
        layers=len(cache.layers),
        compressed_layers=len(coded),
        exact_layers=len(cache.layers) - len(coded),
    )


def _kept(layer: Any) -> float:
    """Entries stored per head."""
    if isinstance(layer, CompactLayer):
        return layer.stored.count + layer.length - layer.tail_start
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.ndim < 4:  # a quantized layer of transformers that holds no others
        return _length(layer)
    return 0 if keys is None else int(keys.shape[-2])


def _length(layer: Any) -> int:
    """Logical length of an attention layer, 0 for state-space layers."""
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


class NexusCache(DynamicCache):
    """A compressed KV cache: pass it as `cache` to `generate` or `forward`.

    Works outside any context manager; attention is routed to it while it is alive. So long, the
    model takes it as `cache` and as `past_key_values` (transformers before 5.24), whichever of them
    is its own name for it.

    Args:
        model: the causal LM that will use it.
        quality: "lossless", "high" (= "conservative"), "balanced", "max" (= "aggressive"), or a
            `CompressionConfig`.
        profile: where the model's profile comes from if it is neither known in this process nor
            stored in the user's cache directory. "auto" (default; `NEXUSQUANT_PROFILE` in the
            environment says otherwise): the model is calibrated now, on text of this package, and
            the profile stored. "first-prompt": the cache's first long prompt builds one while it
            is compressed, for this cache, in whose bytes it counts. "none": coded without. Or a
            profile, or its file.
        **overrides: fields of `CompressionConfig`.

    Raises:
        ConfigError: unknown preset or field.
        ProfileError: a profile that is damaged or another model's.
        UnsupportedError: a model that cannot have a compressed cache (encoder-decoder, no
            DynamicCache, flex attention).

    Example:
        >>> from nexusquant import NexusCache
        >>> cache = NexusCache(model, quality="balanced")
        >>> output = model.generate(input_ids, cache=cache, max_new_tokens=8)
        >>> cache.compression_ratio > 4
        True
    """

    def __init__(
        self,
        model: nn.Module,
        quality: str | CompressionConfig = "balanced",
        *,
        profile: ProfileLike = None,
        **overrides: Any,
    ) -> None:
        model = checked_model(model)
        self.config = resolve_config(quality, **overrides)
        self._profiles = ProfileBook.of(model, self.config, profile)
        super().__init__(config=text_config(model))
        compact_layers(self, model, self.config, Notices(), self._profiles)

    @property
    def profile(self) -> Profile | None:
        """The model's, shared by all its caches and not counted in `nbytes`; or, by "first-prompt",
        this cache's own, which is.
        """
        return self._profiles.profile

    def activate_past_recording(self) -> None:
        """Compress only after `crop` said which tokens stay (early 5.x lacks this on caches)."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens for n <= 0; keep the first n for n > 0 (early 5.x).

        Raises:
            UnsupportedError: some layer cannot; none is changed then.
        """
        for layer in self.layers:
            if isinstance(layer, (CompactLayer, LinearStateLayer)):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def stats(self) -> CacheStats:
        """Everything measured at once."""
        return cache_stats(self)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.stats().nbytes

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per element of the uncompressed cache."""
        return self.stats().bits_per_element

    @property
    def compression_ratio(self) -> float:
        """fp16 bytes of the uncompressed cache over allocated bytes."""
        return self.stats().compression_ratio
