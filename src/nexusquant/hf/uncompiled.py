"""What torch.compile is not to look into: handles have no storage, caches change at every token."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Leave `function` as it is, also in a compiled model: its graph breaks there."""
    done: F = torch.compiler.disable(function)
    return done


_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def plain_model(model: Any) -> Any:
    """The model that `torch.compile(model)` wraps."""
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module):
        return model
    _wrapped.add(inner)
    return inner


def is_compiled(model: nn.Module) -> bool:
    """By whichever of the three ways: `torch.compile(model)`, `model.compile()`, its `forward`."""
    by_call = getattr(model, "_compiled_call_impl", None) is not None
    return model in _wrapped or by_call or hasattr(model.forward, "_torchdynamo_orig_callable")


class UncompiledForward:
    """Leaves the forward pass of one attention module as it is.

    A compiled one would be traced anew for every layer, and up to our functions only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._before = vars(module).get("forward")
        self._ours = uncompiled(module.forward)
        module.forward = self._ours

    def remove(self) -> None:
        """Put back what was there."""
        module = self._module()
        if module is None or vars(module).get("forward") is not self._ours:
            return
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before
