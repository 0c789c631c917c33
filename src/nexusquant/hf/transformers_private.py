"""Every name of transformers that is private or that versions call differently, in one place.

What `transformers` itself exports is imported where it is needed. Anything else (names of its
modules, underscored attributes, what an argument is called) is imported from here, and nowhere
else; `tests/hf/test_transformers_private.py` checks each name and what we expect of it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig

from nexusquant.errors import UnsupportedError
from nexusquant.hf.notices import NexusQuantWarning
from nexusquant.versions import TRANSFORMERS

TESTED = f"nexusquant is tested with {TRANSFORMERS[0]} to {TRANSFORMERS[1]}"
_ADVICE = f"{TESTED}: install one of these, or a newer nexusquant."

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
        f" {_ADVICE}"
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


# -- what a model's cache is called

CACHE_NAMES = ("cache", "past_key_values")
"""Names of that argument: from 5.24 on, and before."""


@lru_cache(maxsize=512)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _cache_name(function: Callable[..., Any]) -> str | None:
    known = _parameters(function)
    return next((name for name in CACHE_NAMES if name in known), None)


def _spelt_out(kind: Any) -> tuple[str, ...]:
    """Parameters of `forward`; where it only hands on what it gets, of the one it hands it to."""
    found = [_parameters(each.forward) for each in kind.__mro__ if "forward" in vars(each)]
    named = (names for names in found if any(name in names for name in CACHE_NAMES))
    return next(named, found[0] if found else ()) if _hands_on(kind.forward) else found[0]


@lru_cache(maxsize=512)
def _hands_on(function: Callable[..., Any]) -> bool:
    kinds = [each.kind for each in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def cache_name(model: Any) -> str | None:
    """What `forward` of a model, or of a class of models, calls the argument with the cache.

    None if it has none by a known name; `cache_obstacle` says why.
    """
    known = _spelt_out(model if isinstance(model, type) else type(model))
    return next((name for name in CACHE_NAMES if name in known), None)


def cache_obstacle(kind: type[Any]) -> str:
    """Why a class of models can be given no cache, in words behind its name; "" if it can."""
    if cache_name(kind) is not None:
        return ""
    if not up_to(TRANSFORMERS[1]) or _cache_name(transformers.LlamaForCausalLM.forward) is None:
        return (
            f"takes its cache by a name that nexusquant does not know: forward of transformers"
            f" {transformers.__version__} has neither {' nor '.join(map(repr, CACHE_NAMES))}."
            f" {_ADVICE}"
        )
    return "keeps no key-value cache"


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` by the name that `forward` of a model has for it: `model(ids, **this)`.

    Raises:
        UnsupportedError: it has none.
    """
    name = cache_name(model)
    if name is None:
        raise UnsupportedError(f"{type(model).__name__} {cache_obstacle(type(model))}")
    return {name: cache}


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, by whichever name; None if there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward call by name, the cache by the one that this model has."""
    given = dict(kwargs)
    if args:
        names = [name for name in _spelt_out(type(model)) if name != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
    return renamed(given, cache_name(model))


def renamed(kwargs: dict[str, Any], name: str | None) -> dict[str, Any]:
    """`kwargs` with the cache called `name` and by no other name.

    Raises:
        UnsupportedError: two different caches by two names.
    """
    if name is None or not any(known in kwargs for known in CACHE_NAMES if known != name):
        return kwargs
    caches = [kwargs[known] for known in CACHE_NAMES if kwargs.get(known) is not None]
    if any(cache is not caches[0] for cache in caches):
        raise UnsupportedError(
            f"two caches were given, as {' and as '.join(map(repr, CACHE_NAMES))}: give one."
        )
    rest = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
    return {**rest, name: caches[0] if caches else None}


def takes_every_name(model: nn.Module) -> Any:
    """Hook a model so that it takes its cache by every name that transformers has given it.

    Returns:
        The handle of the hook, which torch.compile traces: it breaks no graph.
    """
    hook = partial(rename_cache, cache_name(model))
    return model.register_forward_pre_hook(hook, with_kwargs=True)


def rename_cache(name: str | None, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: the cache under `name`."""
    given = renamed(kwargs, name)
    return None if given is kwargs else (args, given)


def generate_cache_name() -> str:
    """What `generate` calls the argument with the cache, and its `model_kwargs` do."""
    return _cache_name(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


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
        f"generate takes the cache by the names {' and '.join(CACHE_NAMES)}",
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
            raise UnsupportedError(f"{text}. {_ADVICE}")
        warnings.warn(f"{text}; the rest works as before. {_ADVICE}", NexusQuantWarning, 2)
