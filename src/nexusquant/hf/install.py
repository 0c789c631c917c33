"""Routing a model's attention to us, under the names that models already use.

While a compressed cache or context is alive, the attention functions of the implementations in
use ("sdpa", "flash_attention_2", ...) are wrapped in transformers' registry: calls that carry our
handles come to us, all others go to the original unchanged. "eager" has no registry entry, so for
eager models the config names an entry of ours meanwhile. Everything is counted and undone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nexusquant.errors import UnsupportedError
from nexusquant.hf.attention import model_of
from nexusquant.hf.cache_names import rename_cache, takes_every_name
from nexusquant.hf.dispatch import eager_attention, make_dispatcher
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.passes import begin, finish, remember_attention, remember_block
from nexusquant.hf.prepare import prepare_generation
from nexusquant.hf.quirks import attention_modules
from nexusquant.hf.transformers_private import (
    attention_tables,
    forget_attention,
    implementation,
    set_implementation,
)
from nexusquant.hf.uncompiled import UncompiledForward, is_compiled


class _EagerName(str):
    """The name of our entry for eager models. Copies and pickles of a config get "eager" back."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("eager",)


EAGER = _EagerName("nexusquant_eager")
_UNREADABLE = ("flex_attention",)  # its masks are functions, not tensors

_lock = threading.RLock()
_Swap = tuple[dict[str, Callable[..., Any]], Callable[..., Any], Callable[..., Any]]
_wrapped: dict[str, tuple[int, list[_Swap]]] = {}
_eager_configs: dict[int, tuple[int, Any]] = {}
_hooks: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[Any]]] = weakref.WeakKeyDictionary()


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs of a model and its submodels."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(found.values())


class Installation:
    """Keeps a model's attention routed to us. `release` is idempotent and safe from any thread."""

    def __init__(self, model: nn.Module) -> None:
        configs = _configs(model)
        for config in configs:
            name = implementation(config)
            if name in _UNREADABLE or (name or "").startswith("paged|"):
                raise UnsupportedError(
                    f"attn_implementation={name!r} is not supported; load the model with 'sdpa',"
                    " 'eager' or a flash attention."
                )
        with _lock:
            self._names = [_wrap(config) for config in configs]
            self._model = weakref.ref(model)
            self._configs = configs
            count, handles = _hooks.get(model, (0, []))
            if not count:
                handles = _hook_attention(model)
            if is_compiled(model) and not any(isinstance(x, UncompiledForward) for x in handles):
                handles += [UncompiledForward(x) for x in model.modules() if x in model_of]
            _hooks[model] = count + 1, handles
            self._live = True

    def release(self) -> None:
        """Undo this installation."""
        with _lock:
            if not self._live:
                return
            self._live = False
            for config, name in zip(self._configs, self._names, strict=True):
                _unwrap(config, name)
            model = self._model()
            if model is None or model not in _hooks:
                return
            count, handles = _hooks.pop(model)
            if count > 1:
                _hooks[model] = count - 1, handles
            else:
                for handle in handles:
                    handle.remove()


class Lease:
    """An `Installation` that lives as long as its holder; a copy of the holder gets its own.

    An unpickled one has no model until `attach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        weakref.finalize(self, Installation(model).release).atexit = False

    @property
    def model(self) -> nn.Module | None:
        """The model, while it exists."""
        return None if self._model is None else self._model()

    @property
    def detached(self) -> bool:
        """Whether it was unpickled and belongs to no model yet."""
        return self._model is None

    def __reduce__(self) -> Any:
        model = self.model
        return _detached, (self.fingerprint if model is None else fingerprint(model),)

    fingerprint = ""  # of the model that an unpickled one belonged to

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease | None:
        if self.detached:
            return _detached(self.fingerprint)
        return Lease(self.model) if self.model is not None else None


def _detached(fingerprint: str) -> Lease:
    lease = Lease.__new__(Lease)
    lease._model, lease.fingerprint = None, fingerprint
    return lease


def drop_copied_hooks(model: nn.Module, *ours: Callable[..., Any]) -> None:
    """Take out hooks that a copy of a model has from the one it was copied from.

    They would run beside its own.
    """
    for module in model.modules():
        for held in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(held.items()):
                if getattr(hook, "func", hook) in ours:
                    del held[key]


def _hook_attention(model: nn.Module) -> list[Any]:
    drop_copied_hooks(model, begin, finish, remember_attention, remember_block, rename_cache)
    within = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    handles: list[Any] = [
        *(takes_every_name(module) for module in within),
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(finish, with_kwargs=True, always_call=True),
        *prepare_generation(model),
    ]
    for name, module in attention_modules(model):
        model_of[module] = weakref.ref(model)
        handles.append(module.register_forward_pre_hook(remember_attention, with_kwargs=True))
        parent = model.get_submodule(name.rpartition(".")[0])
        handles.append(parent.register_forward_pre_hook(remember_block, with_kwargs=True))
    return handles


def _wrap(config: Any) -> str | None:
    name = implementation(config)
    if name == "eager" or name == EAGER:
        count, _ = _eager_configs.get(id(config), (0, config))
        _eager_configs[id(config)] = count + 1, config
        if name == "eager":
            AttentionInterface.register(EAGER, eager_attention)
            AttentionMaskInterface.register(EAGER, AttentionMaskInterface()["eager"])
            set_implementation(config, EAGER)
        return EAGER
    if name is None or name not in AttentionInterface():
        return None
    count, swaps = _wrapped.get(name, (0, []))
    if not count:
        for table in attention_tables():
            if name in table:
                swaps.append((table, table[name], make_dispatcher(table[name])))
                table[name] = swaps[-1][2]
    _wrapped[name] = count + 1, swaps
    return name


def _unwrap(config: Any, name: str | None) -> None:
    if name is None:
        return
    if name == EAGER:
        count, _ = _eager_configs.pop(id(config))
        if count > 1:
            _eager_configs[id(config)] = count - 1, config
        elif implementation(config) == EAGER:
            set_implementation(config, "eager")
        if not _eager_configs:
            forget_attention(EAGER)
        return
    count, swaps = _wrapped.pop(name)
    if count > 1:
        _wrapped[name] = count - 1, swaps
        return
    for table, original, ours in swaps:
        if table.get(name) is ours:
            table[name] = original
