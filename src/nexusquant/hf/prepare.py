"""What happens when `generate` is called, before it runs the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from nexusquant.hf.cache_names import generate_cache_name, given_cache, renamed
from nexusquant.hf.transformers_private import PREPARE_CACHE, VALIDATE, GenerationMode

starters: list[Callable[[nn.Module, Any], None]] = []
"""Called with the model and its cache: blocks make the cache compact."""


def prepare_generation(model: nn.Module) -> list[Any]:
    """Stand before a model's methods; each has a `remove`. None if some are somebody else's."""
    known = {VALIDATE: _Validate, PREPARE_CACHE: _Prepare}
    for name in known:
        held = vars(model).get(name)
        if held is not None and getattr(held, "__func__", 0) is getattr(type(model), name, None):
            delattr(model, name)  # what a copy of a model has in place of ours
    if any(name in vars(model) or not hasattr(type(model), name) for name in known):
        return []
    return [stand(model, name) for name, stand in known.items()]


class _Before:
    """Stands before one method of a model, of this instance alone, until `remove`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self._name = weakref.ref(model), name
        setattr(model, name, self)

    def remove(self) -> None:
        """Uncover the method of the class."""
        model = self._model()
        if model is not None and vars(model).get(self._name) is self:
            delattr(model, self._name)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method."""
        model = self._model()
        return getattr(type(model), self._name)(model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of the model hold its own method instead."""
        return getattr, (self._model(), self._name)


class _Validate(_Before):
    """Lets `generate` be given the cache by every name that transformers has had for it."""

    def __call__(self, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self._own(renamed(model_kwargs, generate_cache_name()), *args, **kwargs)


class _Prepare(_Before):
    """Lets `generate` start right, once it has its cache.

    The forward pre-hook is too late for assisted decoding, whose rollbacks have to be announced to
    the cache (`activate_past_recording`) before the first forward pass; and nothing else tells that
    the rollbacks are over when the next call decodes without drafts.
    """

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model = self._model()
        assert model is not None  # its own method is running
        given = renamed(model_kwargs, generate_cache_name())
        if given is not model_kwargs:  # `generate` goes on with this very dictionary
            model_kwargs.clear()
            model_kwargs.update(given)
        result = self._own(generation_config, model_kwargs, *args, **kwargs)
        cache = given_cache(model_kwargs)
        if cache is not None:
            for starter in starters:
                starter(model, cache)
            modes = [x for x in (*args, *kwargs.values()) if isinstance(x, GenerationMode)]
            drafted = GenerationMode.ASSISTED_GENERATION in modes
            drafts = getattr(generation_config, "is_assistant", False)
            _record(cache, drafts or drafted, ended=bool(modes))
        return result


def _record(cache: Any, rollbacks: bool, ended: bool) -> None:
    """Let a cache expect rollbacks, or no more. transformers does the former from 5.13 on only."""
    for layer in getattr(cache, "layers", ()):
        if rollbacks:
            getattr(layer, "activate_past_recording", lambda: None)()
        elif ended:
            getattr(layer, "stop_past_recording", lambda: None)()
