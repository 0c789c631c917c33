"""Attention calls that carry our handles come to us, all others go where they always went."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nexusquant.errors import UnsupportedError
from nexusquant.hf.attention import nexus_attention
from nexusquant.hf.handle import KVHandle
from nexusquant.hf.uncompiled import uncompiled


def _ours(key: Any, value: Any) -> bool:
    """Whether both are what `update` returned; reshaped ones are no longer keys and values."""
    return all(isinstance(x, KVHandle) and x.untouched for x in (key, value))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The mask and dropout come in this order if not by name (kvpress); "eager" differs."""
    return {**dict(zip(("attention_mask", "dropout"), args, strict=False)), **kwargs}


def make_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    @uncompiled
    def dispatch(
        module: nn.Module, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _ours(key, value):
            return nexus_attention(original, module, query, key.snapshot, **_named(args, kwargs))
        return original(module, query, key, value, *args, **kwargs)

    return dispatch


@uncompiled
def eager_attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
) -> Any:
    """The eager function of the module's own file, or ours."""
    original = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if original is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no eager attention function we can find; load the model"
            " with attn_implementation='sdpa'."
        )
    if _ours(key, value):
        return nexus_attention(original, module, query, key.snapshot, **_named(args, kwargs))
    return original(module, query, key, value, **_named(args, kwargs))
