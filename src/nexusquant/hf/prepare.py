"""What happens when `generate` has its cache and has not run the model yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.generation.utils import GenerationMode

_NAME = "_prepare_cache_for_generation"

starters: list[Callable[[nn.Module, Any], None]] = []
"""Called with the model and its cache: blocks make the cache compact."""


def prepare_generation(model: nn.Module) -> list[Any]:
    """Stand before a model's method; what has a `remove`, if it has such a method."""
    return [_Prepare(model)] if hasattr(type(model), _NAME) and _NAME not in vars(model) else []


class _Prepare:
    """Stands before a model's `_prepare_cache_for_generation`, so that `generate` starts right.

    The forward pre-hook is too late for assisted decoding, which announces its rollbacks to the
    cache (`activate_past_recording`) before the first forward pass; and nothing else tells that the
    rollbacks are over when the next call decodes without drafts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        setattr(model, _NAME, self)

    def remove(self) -> None:
        """Uncover the method of the class."""
        model = self._model()
        if model is not None and vars(model).get(_NAME) is self:
            delattr(model, _NAME)

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model = self._model()
        assert model is not None  # its own method is running
        result = getattr(type(model), _NAME)(
            model, generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            for starter in starters:
                starter(model, cache)
            modes = [x for x in (*args, *kwargs.values()) if isinstance(x, GenerationMode)]
            drafted = GenerationMode.ASSISTED_GENERATION in modes
            _record(cache, getattr(generation_config, "is_assistant", False), drafted or not modes)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of the model hold its own method instead."""
        return getattr, (self._model(), _NAME)


def _record(cache: Any, drafts: bool, drafted: bool) -> None:
    """Rollbacks are to be expected of a cache that drafts, none of one that does neither."""
    for layer in getattr(cache, "layers", ()):
        if drafts:  # early 5.x has no such method on caches
            getattr(layer, "activate_past_recording", lambda: None)()
        elif not drafted:
            getattr(layer, "stop_past_recording", lambda: None)()
