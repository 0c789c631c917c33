"""Models whose caches cannot be compressed at all, told before anything runs."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from nexusquant.hf.cache_names import cache_obstacle
from nexusquant.hf.transformers_private import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicLayer,
    supports_dynamic_cache,
)

ENCODER_DECODER = "is an encoder-decoder model; only decoder-only models are supported"


def refusal_of(config: Any) -> str:
    """As `refusal`, of the class that a config is for; of no class if transformers knows none."""
    architectures = getattr(config, "architectures", None) or ()
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    both_sides = any("ForConditionalGeneration" in name for name in architectures) or not known
    if getattr(config, "is_encoder_decoder", False) and both_sides:
        return ENCODER_DECODER
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if known else None
    return refusal(model[0] if isinstance(model, (tuple, list)) else model, config)


def refusal(model: type[Any] | None, config: Any) -> str:
    """Why caches of a model class cannot be compressed, "" if they can."""
    if not supports_dynamic_cache(model):
        return "does not use a key-value cache that transformers manages (DynamicCache)"
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        return "has no attention layers"
    return cache_obstacle(model) if model else ""
