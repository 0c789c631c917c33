"""Attention for compressed caches, under the names that models already use.

While a compressed cache or context is alive, the attention functions of the implementations in
use ("sdpa", "flash_attention_2", ...) are wrapped in transformers' registry: calls that carry our
handles come here, all others go to the original unchanged. "eager" has no registry entry, so for
eager models the config names an entry of ours meanwhile. Everything is counted and undone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from nexusquant.attention import Mask, attend
from nexusquant.errors import UnsupportedError
from nexusquant.hf.handle import KVHandle, Snapshot
from nexusquant.hf.rope_tables import RotaryCall, forget_workspace, rotary_frequencies
from nexusquant.math.rope import Frequencies


class _EagerName(str):
    """The name of our entry for eager models. Copies and pickles of a config get "eager" back."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("eager",)


EAGER = _EagerName("nexusquant_eager")
_UNREADABLE = ("flex_attention",)  # its masks are functions, not tensors
_REFUSED = ("position_bias", "indices", "block_indices", "cu_seq_lens_q")

_lock = threading.RLock()
_wrapped: dict[str, tuple[int, Callable[..., Any], Callable[..., Any]]] = {}
_eager_configs: dict[int, tuple[int, Any]] = {}
_call = threading.local()
_models_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = (
    weakref.WeakKeyDictionary()
)
_hooks: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[Any]]] = weakref.WeakKeyDictionary()


def _remember_rotary(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of attention modules: the rotary rows of the call that is about to run."""
    rows = kwargs.get("position_embeddings")
    if isinstance(rows, (tuple, list)) and len(rows) == 2 and torch.is_tensor(rows[0]):
        _call.rotary = id(module), RotaryCall(rows[0], rows[1], kwargs.get("position_ids"))
    else:
        _call.rotary = id(module), None


def _rotary_of(module: nn.Module) -> RotaryCall | None:
    owner, rows = getattr(_call, "rotary", (None, None))
    _call.rotary = None, None
    return rows if owner == id(module) else None


def _finish(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, also after exceptions: rotary rows are workspace of one pass."""
    for table in getattr(_call, "tables", ()):
        forget_workspace(table)
    _call.tables = weakref.WeakSet()
    _call.rotary = None, None


def _candidates(module: nn.Module) -> list[Frequencies]:
    reference = _models_of.get(module)
    model = reference() if reference is not None else None
    return rotary_frequencies(model) if model is not None else []


def _nexus_attention(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: KVHandle,
    value: KVHandle,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention while nothing is compressed, else over codes; then compress this layer."""
    snapshot: Snapshot = key.snapshot
    layer = snapshot.layer
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer.record_rotary(_rotary_of(module), module, snapshot, lambda: _candidates(module))
    if layer.rope is not None and layer.rope.owner:
        if not hasattr(_call, "tables"):
            _call.tables = weakref.WeakSet()
        _call.tables.add(layer.rope.table)
    _check(module, query, snapshot, attention_mask, kwargs)
    if not snapshot.compressed:
        keys, values = snapshot.dense()
        output, weights = original(
            module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    else:
        _refuse(module, kwargs)
        mask = Mask(
            attention_mask, snapshot.length - snapshot.new, snapshot.first_column,
            kwargs.get("sliding_window"),
        )  # fmt: skip
        output = attend(
            query, snapshot.parts(), mask, frame=layer.frame(), scaling=scale,
            softcap=kwargs.get("softcap"), sink_logits=kwargs.get("s_aux"),
        ).transpose(1, 2).contiguous()  # fmt: skip
        weights = None
    valid = _valid(attention_mask, snapshot)
    layer.absorb(query, valid, scale, kwargs.get("softcap"))
    return output, weights


def _check(
    module: nn.Module, query: Tensor, snapshot: Snapshot, mask: Any, kwargs: dict[str, Any]
) -> None:
    """What can never work on a cache that will be compressed."""
    if module.training and query.requires_grad:
        raise UnsupportedError(
            "no gradient flows through a compressed cache; call model.eval() first, or train"
            " without a cache (use_cache=False)."
        )
    if query.shape[1] % snapshot.tail_keys.shape[1]:
        raise UnsupportedError(
            f"{type(module).__name__}: {query.shape[1]} query heads do not divide into"
            f" {snapshot.tail_keys.shape[1]} KV heads."
        )
    if mask is not None and not torch.is_tensor(mask):
        raise UnsupportedError(
            f"{type(module).__name__} passes a mask of type {type(mask).__name__}; load the model"
            " with attn_implementation='sdpa'."
        )


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Arguments that attention over codes does not implement."""
    given = [name for name in _REFUSED if kwargs.get(name) is not None]
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        given.append("is_causal=False")
    if kwargs.get("output_attentions"):
        given.append("output_attentions")
    if given:
        raise UnsupportedError(
            f"{type(module).__name__}: {', '.join(given)} cannot be used with a compressed past."
        )


def _valid(mask: Tensor | None, snapshot: Snapshot) -> Tensor | None:
    """(batch, tail) bool: tail tokens that some query may see; None if all."""
    if mask is None:
        return None
    if mask.ndim == 2:
        seen = mask.bool()
    elif mask.dtype == torch.bool:
        seen = mask.any(-2).any(1)
    else:
        seen = (mask > torch.finfo(mask.dtype).min / 2).any(-2).any(1)
    batch, tail = snapshot.tail_keys.shape[0], snapshot.tail_keys.shape[2]
    start = snapshot.tail_start - snapshot.first_column
    columns = torch.arange(start, start + tail, device=seen.device)
    picked = seen[:, columns.clamp(min=0)] & (columns >= 0)
    return None if bool(picked.all()) else picked.expand(batch, -1)


def _make_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(key, KVHandle) and isinstance(value, KVHandle):
            return _nexus_attention(original, module, query, key, value, *args, **kwargs)
        return original(module, query, key, value, *args, **kwargs)

    return dispatch


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The eager function of the module's own file, or ours."""
    original = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if original is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no eager attention function we can find; load the model"
            " with attn_implementation='sdpa'."
        )
    if isinstance(key, KVHandle) and isinstance(value, KVHandle):
        return _nexus_attention(original, module, query, key, value, *args, **kwargs)
    return original(module, query, key, value, *args, **kwargs)


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs of a model and its submodels."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(found.values())


class Installation:
    """Keeps a model's attention routed to us. `release` is idempotent and safe from any thread."""

    def __init__(self, model: nn.Module) -> None:
        configs = _configs(model)
        for config in configs:
            name = config._attn_implementation
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
    """An `Installation` that lives as long as its holder; a copy of the holder gets its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        weakref.finalize(self, Installation(model).release).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease | None:
        model = self._model()
        return Lease(model) if model is not None else None


def _hook_attention(model: nn.Module) -> list[Any]:
    handles = [model.register_forward_hook(_finish, always_call=True)]
    for module in model.modules():
        if "ttention" in type(module).__name__ and hasattr(module, "layer_idx"):
            _models_of[module] = weakref.ref(model)
            handles.append(module.register_forward_pre_hook(_remember_rotary, with_kwargs=True))
    return handles


def _wrap(config: Any) -> str | None:
    name: str | None = config._attn_implementation
    if name == "eager" or name == EAGER:
        count, _ = _eager_configs.get(id(config), (0, config))
        _eager_configs[id(config)] = count + 1, config
        if name == "eager":
            AttentionInterface.register(EAGER, _eager)
            AttentionMaskInterface.register(EAGER, AttentionMaskInterface()["eager"])
            config._attn_implementation_internal = EAGER
        return EAGER
    if name is None or name not in AttentionInterface():
        return None
    count, original, ours = _wrapped.get(name, (0, AttentionInterface()[name], None))
    if ours is None:
        ours = _make_dispatcher(original)
        AttentionInterface.register(name, ours)
    _wrapped[name] = count + 1, original, ours
    return name


def _unwrap(config: Any, name: str | None) -> None:
    if name is None:
        return
    if name == EAGER:
        count, _ = _eager_configs.pop(id(config))
        if count > 1:
            _eager_configs[id(config)] = count - 1, config
        elif config._attn_implementation == EAGER:
            config._attn_implementation_internal = "eager"
        if not _eager_configs:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(EAGER, None)
        return
    count, original, ours = _wrapped.pop(name)
    if count > 1:
        _wrapped[name] = count - 1, original, ours
    elif AttentionInterface._global_mapping.get(name) is ours:
        AttentionInterface.register(name, original)
