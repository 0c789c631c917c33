"""A tiny random model for every causal language model that transformers knows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tests.zoo.per_type import GENERATION, OWN, UNBUILT
from tests.zoo.settings import COMMON, LAYERS, PER_LAYER, TOKENS

__all__ = ["UNBUILT", "ZOO", "build", "config_of", "quiet"]

ZOO: tuple[str, ...] = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNBUILT)))


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of this type: float32, on the CPU, in eval mode."""
    with quiet():
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        config = _own_part(config_of(model_type), model_class)
        attention = "sdpa" if model_class._supports_sdpa else "eager"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class._from_config(config, attn_implementation=attention)
        model.generation_config.update(**GENERATION.get(model_type, {}))
        return model.to(torch.float32).eval()


def config_of(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of this type."""
    return CONFIG_MAPPING[model_type](**_settings(CONFIG_MAPPING[model_type]))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what transformers says of odd numbers: they are meant."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _settings(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What to construct a tiny configuration of this class with."""
    fields = vars(config_class())
    settings: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = _settings(type(value))
        elif name in PER_LAYER and isinstance(value, list | tuple) and value:
            settings[name] = _repeat(list(value))
        elif name in COMMON and isinstance(value, int | float) and not isinstance(value, bool):
            settings[name] = COMMON[name]
        elif name in TOKENS:
            settings[name] = TOKENS[name]
    # Latent attention: as many heads for keys as for queries, and head_dim follows from its parts.
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings.pop("head_dim", None)
    return _over(settings, copy.deepcopy(OWN.get(config_class.model_type, {})))


def _over(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `own` over them, also within the parts."""
    merged = dict(settings)
    for name, value in own.items():
        part = merged.get(name)
        nested = isinstance(part, dict) and isinstance(value, dict)
        merged[name] = _over(part, value) if nested else value
    return merged


def _repeat(values: list[Any]) -> list[Any]:
    """The different entries of `values` in turn, full attention in the last layer."""
    kinds = sorted(dict.fromkeys(values), key=lambda kind: kind == "full_attention")
    repeated = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    if "full_attention" in kinds:
        repeated[-1] = "full_attention"
    return repeated


def _own_part(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The part of `config` that this class of models is made from, or all of it."""
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and type(part) is model_class.config_class:
            return part
    return config
