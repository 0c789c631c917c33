"""Every name of transformers that is private or may move, in one place.

What `transformers` itself exports is imported where it is needed. Anything else (names of its
modules, underscored attributes) is imported from here, and nowhere else;
`tests/hf/test_transformers_private.py` checks each name and what we expect of it. What models call
their cache is in `cache_names`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import transformers
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig

from nexusquant.errors import UnsupportedError
from nexusquant.hf.notices import NexusQuantWarning
from nexusquant.versions import TRANSFORMERS

TESTED = f"nexusquant is tested with {TRANSFORMERS[0]} to {TRANSFORMERS[1]}"
ADVICE = f"{TESTED}: install one of these, or a newer nexusquant."

try:
    from transformers import cache_utils
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerationMode
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
except ImportError as error:  # it says which name of which module
    raise UnsupportedError(
        f"transformers {transformers.__version__} has moved what nexusquant needs ({error});"
        f" {ADVICE}"
    ) from error

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ROPE_INIT_FUNCTIONS",
    "STOCK_HYBRID",
    "STOCK_HYBRID_SLIDING",
    "STOCK_LINEAR",
    "AttentionInterface",
    "AttentionMaskInterface",
    "BaseStreamer",
    "Cache",
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMode",
]


def up_to(version: str) -> bool:
    """Whether the installed transformers is of this release or of an earlier one."""

    def numbers(text: str) -> tuple[int, ...]:  # "5.24.0.dev0" is (5, 24, 0)
        return tuple(int(x) for x in text.split("+")[0].split(".") if x.isdigit())

    return numbers(transformers.__version__) <= numbers(version)


# -- layers of a cache

# Early 5.x has no such layers: its models keep their states in caches of their own.
STOCK_LINEAR: Any = getattr(cache_utils, "LinearAttentionLayer", None)
STOCK_HYBRID: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
STOCK_HYBRID_SLIDING: Any = getattr(
    cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None
)

_LAYER_METHODS = (
    "get_mask_sizes", "get_max_cache_shape", "get_max_length", "get_seq_length",
    "lazy_initialization", "update",
)  # fmt: skip
"""What cache layers have to define, in one tested version or another."""


# -- how `generate` begins

VALIDATE = "_validate_model_kwargs"
"""Method of models that `generate` looks for misspelt arguments with: (copy of model_kwargs)."""
PREPARE_CACHE = "_prepare_cache_for_generation"
"""Method of models that `generate` makes its cache with: (generation_config, model_kwargs, ...)."""


# -- which attention function runs

IMPLEMENTATION = "_attn_implementation"
_IMPLEMENTATION_HELD = "_attn_implementation_internal"


def implementation(config: Any) -> str | None:
    """The name of the attention function that a config asks for."""
    name: str | None = getattr(config, IMPLEMENTATION)
    return name


def set_implementation(config: Any, name: str) -> None:
    """Change that name, of this config alone: the public setter goes on to configs within."""
    setattr(config, _IMPLEMENTATION_HELD, name)


def attention_tables() -> list[dict[str, Callable[..., Any]]]:
    """Where models look attention functions up, the first that has a name first.

    kvpress, once imported, has functions of its own in the first.
    """
    local: dict[str, Any] = getattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})
    return [local, AttentionInterface._global_mapping]


def forget_attention(name: str) -> None:
    """Take a registered attention function and its masks out again."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


# -- what a class of models says of itself


def supports_dynamic_cache(kind: Any) -> bool:
    """Whether a class of models uses caches of transformers; True if it does not say."""
    says = getattr(kind, "_supports_default_dynamic_cache", None)
    return says is None or bool(says())


# -- is everything there?


@dataclass(frozen=True)
class Need:
    """Something of transformers that we rely on.

    Attributes:
        name: as one would look for it.
        purpose: what does not work without, as the end of a sentence.
        there: whether this transformers has it.
        essential: whether no cache can be compressed without.
    """

    name: str
    purpose: str
    there: Callable[[], bool]
    essential: bool = True


NEEDS = (
    Need(
        "DynamicCache.layers",
        "caches hold layers that can be replaced",
        lambda: isinstance(getattr(DynamicCache(), "layers", None), list),
    ),
    Need(
        f"CacheLayerMixin with nothing to be defined but {', '.join(_LAYER_METHODS)}",
        "cache layers of our own can be made",
        lambda: CacheLayerMixin.__abstractmethods__ <= {*_LAYER_METHODS},
    ),
    Need(
        "AttentionInterface._global_mapping",
        "attention is routed to compressed caches",
        lambda: "sdpa" in getattr(AttentionInterface, "_global_mapping", ()),
    ),
    Need(
        f"PreTrainedConfig.{_IMPLEMENTATION_HELD}",
        "attention is routed to compressed caches, in models with eager attention",
        lambda: hasattr(PreTrainedConfig(), _IMPLEMENTATION_HELD),
    ),
    Need(
        "ALL_ATTENTION_FUNCTIONS._local_mapping",
        "attention is routed to compressed caches once kvpress is imported",
        lambda: isinstance(getattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", None), dict),
        essential=False,
    ),
    Need(
        f"GenerationMixin.{PREPARE_CACHE}",
        "generate with drafts (prompt lookup, assistants) can take tokens back",
        lambda: hasattr(GenerationMixin, PREPARE_CACHE),
        essential=False,
    ),
    Need(
        f"GenerationMixin.{VALIDATE}",
        "generate takes the cache by every name that transformers has given it",
        lambda: hasattr(GenerationMixin, VALIDATE),
        essential=False,
    ),
    Need(
        "GenerationMode.ASSISTED_GENERATION",
        "generate with drafts (prompt lookup, assistants) can take tokens back",
        lambda: hasattr(GenerationMode, "ASSISTED_GENERATION"),
        essential=False,
    ),
    Need(
        "GenerationMixin._supports_default_dynamic_cache",
        "models that keep caches of their own are refused before they run",
        lambda: hasattr(GenerationMixin, "_supports_default_dynamic_cache"),
        essential=False,
    ),
)


@lru_cache(maxsize=1)
def check_transformers() -> None:
    """Look once whether this transformers has all that we rely on; warns of what is not essential.

    Raises:
        UnsupportedError: something essential is missing; it says what.
    """
    missing = [need for need in NEEDS if not need.there()]
    here = f"transformers {transformers.__version__}"
    for need in sorted(missing, key=lambda need: not need.essential):
        text = f"{here} has no {need.name}, with which {need.purpose}"
        if need.essential:
            raise UnsupportedError(f"{text}. {ADVICE}")
        warnings.warn(f"{text}; the rest works as before. {ADVICE}", NexusQuantWarning, 2)
