"""What a compact layer's `update` returns: K and V by name only, without storage.

A handle has the logical shape of the tensor it stands for. Attention functions that transformers
dispatches to us read its snapshot. Models that multiply queries, keys and values themselves (GPT-J,
BLOOM, Falcon, ...) see a tensor: reshaping, transposing and casting it gives another handle; the
product with the queries is computed on decoded keys, and what was evicted gets the least logit
there is, so that the model's own softmax gives it no weight. Any other operation materialises the
tensor, so models that touch K or V in between still work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from nexusquant.errors import UnsupportedError
from nexusquant.hf.attention import attended, nexus_attention
from nexusquant.hf.passes import attention_under_way, note_read
from nexusquant.hf.precision import refuse_gradient
from nexusquant.hf.quirks import scaling_of
from nexusquant.hf.snapshot import Snapshot
from nexusquant.hf.view import View

_aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_READ_ONLY = "keys and values of a compressed cache cannot be written to; copy them first (x + 0)."
KEYS, VALUES = 0, 1


class KVHandle(torch.Tensor):
    """Tensor subclass without storage for the K or V of a `Snapshot`."""

    snapshot: Snapshot
    which: int
    seen_as: View

    @staticmethod
    def __new__(cls, snapshot: Snapshot, which: int, view: View | None = None) -> KVHandle:
        view = view or View()
        base = snapshot.shape(which)
        handle = torch.Tensor._make_wrapper_subclass(
            cls, view.shape(base), strides=view.strides(base),
            dtype=view.dtype or snapshot.tail_keys.dtype, device=snapshot.tail_keys.device,
            requires_grad=False,
        )  # fmt: skip
        handle.snapshot, handle.which, handle.seen_as = snapshot, which, view
        return handle

    def __init__(self, *_: Any) -> None:
        super().__init__()

    # mypy forgets the names of a dunder's parameters: not even torch's own signature matches it.
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({'KV'[self.which]}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def untouched(self) -> bool:
        """Whether it is what `update` returned."""
        return self.seen_as == View()

    def materialize(self) -> Tensor:
        """The real tensor, laid out as the handle claims to be.

        Raises:
            UnsupportedError: tokens were evicted, so there is no such tensor.
        """
        note_read(self.snapshot.layer)
        return self._laid_out(self.snapshot.dense(self.which))

    def _laid_out(self, x: Tensor) -> Tensor:
        x = replace(self.seen_as, transposed=False).of(x).contiguous()
        return x.mT if self.seen_as.transposed else x

    def _seen_as(self, **changes: Any) -> KVHandle:
        return KVHandle(self.snapshot, self.which, replace(self.seen_as, **changes))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__setitem__ and isinstance(args[0], KVHandle):
            raise UnsupportedError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.scaled_dot_product_attention:
                return _scaled_dot_product(func, *args, **kwargs)
            return func(*args, **kwargs)

    # torch calls this as a classmethod (func, types, args, kwargs); its stub declares an instance
    # method with other parameters, so no correct override matches it.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _VIEWS.get(func) or _PRODUCTS.get(func)
        if special is not None:
            result = special(func, args, kwargs)
            if result is not None:
                return result

        if func.has_kernel_for_dispatch_key(_COMPOSITE):  # inference mode leaves them whole
            return func.decompose(*args, **kwargs)
        _refuse_writing(func, args, kwargs)

        def real(x: Any) -> Any:
            return x.materialize() if isinstance(x, KVHandle) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs))


def _refuse_writing(func: Any, args: Any, kwargs: Any) -> None:
    """What is written into a handle would be lost."""
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        if isinstance(given, KVHandle) and alias is not None and alias.is_write:
            raise UnsupportedError(_READ_ONLY)


def handles(snapshot: Snapshot, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Those of K and V; gradients through them go to the new keys and values, as ever."""
    tracked = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    if not tracked:
        return KVHandle(snapshot, KEYS), KVHandle(snapshot, VALUES)
    return _Tracked.apply(keys, snapshot, KEYS), _Tracked.apply(values, snapshot, VALUES)


class _Tracked(torch.autograd.Function):
    """The handle that new keys or values are part of."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, snapshot: Snapshot, which: int) -> KVHandle:
        ctx.past = snapshot.visible - new.shape[2]
        return KVHandle(snapshot, which)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return refuse_gradient(gradient) if ctx.past else gradient, None, None


# Every function below takes (func, args, kwargs) of an operation on a handle and returns its
# result, or None if it is not as attention modules call it.


def _transpose(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    x, *dims = args
    if {dim % x.ndim for dim in dims} != {x.ndim - 2, x.ndim - 1}:
        return None
    return x._seen_as(transposed=not x.seen_as.transposed)


def _permute(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    x, dims = args
    order = [dim % x.ndim for dim in dims]
    plain = list(range(x.ndim))
    if order == plain:
        return x._seen_as()
    if order == [*plain[:-2], plain[-1], plain[-2]]:
        return x._seen_as(transposed=not x.seen_as.transposed)
    return None


def _view(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    x, shape = args
    base = x.snapshot.shape(x.which)
    known = [s for s in shape if s != -1]
    missing = x.numel() // max(1, torch.Size(known).numel())
    wanted = tuple(missing if s == -1 else s for s in shape)
    for flat in (False, True):
        view = replace(x.seen_as, flat=flat)
        if view.shape(base) == wanted:
            return x._seen_as(flat=flat)
    return None


def _expand(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    x, shape = args
    wanted = tuple(have if s == -1 else s for s, have in zip(shape, x.shape, strict=False))
    if wanted == tuple(x.shape):
        return x._seen_as()
    one_head = not x.seen_as.flat and x.ndim == 4 and x.shape[1] == 1
    if one_head and len(wanted) == 4 and wanted == (x.shape[0], wanted[1], *x.shape[2:]):
        return x._seen_as(repeat=wanted[1])
    return None


def _cast(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    x = args[0]
    device = kwargs.get("device")
    if device is not None and torch.device(device) != x.device:
        return None
    return x._seen_as(dtype=kwargs.get("dtype") or x.seen_as.dtype)


def _same(func: Any, args: Any, kwargs: Any) -> KVHandle | None:
    return args[0]._seen_as()


_VIEWS: dict[Any, Callable[[Any, Any, Any], KVHandle | None]] = {
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.expand.default: _expand,
    _aten._to_copy.default: _cast,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
}


def _product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """(..., left, handle) multiplied as batches of matrices: logits, or the attention's output."""
    *rest, left, handle = args
    if not isinstance(handle, KVHandle) or any(isinstance(x, KVHandle) for x in (*rest, left)):
        return None
    logits = handle.which == KEYS
    if handle.seen_as.transposed != logits or attention_under_way(handle.snapshot.layer) is None:
        return None
    snapshot = handle.snapshot
    whole, missing = snapshot.filled(handle.which)
    result: Tensor = func(*rest, left, handle._laid_out(whole), **kwargs)
    if not logits:
        _finish(snapshot)
        return result
    heads = whole.shape[1] * handle.seen_as.repeat
    snapshot.queries.append(left.detach().unflatten(0, (-1, heads)).to(whole.dtype))
    if missing is not None:
        hidden = replace(handle.seen_as, transposed=False, dtype=None).of(missing)
        result = result.masked_fill(hidden[..., None, :], torch.finfo(result.dtype).min)
    return result


_PRODUCTS: dict[Any, Callable[[Any, Any, Any], Tensor | None]] = {
    _aten.bmm.default: _product,
    _aten.baddbmm.default: _product,
}


def _finish(snapshot: Snapshot) -> None:
    """The model multiplied its weights with the values: attention of this layer is done."""
    running = attention_under_way(snapshot.layer)
    if running is None or not snapshot.queries:
        return
    module, mask = running
    query = snapshot.queries.pop()
    attended(module, snapshot, query, mask, scaling_of(module, query.shape[-1]))


def _scaled_dot_product(
    func: Callable[..., Tensor],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """A module calls PyTorch's attention itself (Falcon)."""

    def stock(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **__: Any) -> tuple[Tensor, None]:
        given = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return func(q, k, v, **given, **kwargs).transpose(1, 2), None

    handles = [isinstance(x, KVHandle) and x.untouched for x in (key, value)]
    running = attention_under_way(key.snapshot.layer) if all(handles) else None
    if running is None:
        return stock(None, query, key, value, attn_mask)[0].transpose(1, 2)
    output, _ = nexus_attention(
        stock, running[0], query, key.snapshot, attn_mask, scaling=scale, dropout=dropout_p,
        is_causal=is_causal,
    )  # fmt: skip
    return output.transpose(1, 2)
