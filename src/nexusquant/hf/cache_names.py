"""What a model calls the argument with its cache: `cache`, or `past_key_values` before 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin

from nexusquant.errors import UnsupportedError
from nexusquant.hf.transformers_private import ADVICE, up_to
from nexusquant.versions import TRANSFORMERS

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
            f" {ADVICE}"
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
