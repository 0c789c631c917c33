"""Attention over a compact layer: exact while nothing is compressed, else over codes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.attention import attend
from nexusquant.errors import UnsupportedError
from nexusquant.hf.output_side import output_side
from nexusquant.hf.passes import current_block, rotary_of
from nexusquant.hf.precision import own_arithmetic, refuse_gradient
from nexusquant.hf.quirks import readable_mask
from nexusquant.hf.rope_tables import rotary_frequencies
from nexusquant.hf.snapshot import Snapshot
from nexusquant.hf.tail import Call
from nexusquant.mask import Mask
from nexusquant.math.rope import Frequencies

_REFUSED = ("position_bias", "indices", "block_indices", "cu_seq_lens_q")

model_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Attention module to the model it was hooked in."""


def _candidates(module: nn.Module) -> list[Frequencies]:
    reference = model_of.get(module)
    model = reference() if reference is not None else None
    return rotary_frequencies(model) if model is not None else []


def nexus_attention(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    snapshot: Snapshot,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention while nothing is compressed, else over codes; then compress this layer.

    Args:
        original: transformers' attention function, called while nothing is compressed.
        query: (batch, query_heads, q_len, dim).
        attention_mask: as transformers passes it to `original`.

    Returns:
        (batch, q_len, query_heads, value_dim) and, from `original`, maybe the weights.

    Raises:
        UnsupportedError: something that attention over codes does not implement.
    """
    layer = snapshot.layer
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _check(module, query, snapshot, attention_mask)
    refused = _refused(module, query, attention_mask, kwargs)
    if refused and not snapshot.compressed:
        layer.stay_exact(f"{type(module).__name__} uses {refused}")
    if layer.pending:
        _record_rotary(module, snapshot)
    if not snapshot.compressed:
        keys, values = snapshot.dense(0), snapshot.dense(1)
        output, weights = original(
            module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    elif refused:
        raise UnsupportedError(
            f"{type(module).__name__}: {refused} cannot be used with a compressed past."
        )
    else:
        mask = Mask(
            attention_mask, snapshot.length - snapshot.new, snapshot.first_column,
            kwargs.get("sliding_window"),
        )  # fmt: skip
        with own_arithmetic(query.device):
            output = attend(
                query, snapshot.parts(), mask, frame=layer.frame(), scaling=scale,
                softcap=kwargs.get("softcap"), sink_logits=kwargs.get("s_aux"),
            ).transpose(1, 2).contiguous()  # fmt: skip
        output, weights = _NoGradient.apply(query, output), None
    if output.requires_grad and not snapshot.compressed and snapshot.length > snapshot.new:
        output.register_hook(refuse_gradient)
    if layer.pending:  # else another layer's keys and values are shared
        valid = _valid(attention_mask, snapshot)
        _absorb(module, snapshot, query, valid, scale, kwargs.get("softcap"))
    return output, weights


def attended(
    module: nn.Module, snapshot: Snapshot, query: Tensor, mask: Any, scaling: float
) -> None:
    """A module computed attention over `snapshot` itself: compress its layer.

    Args:
        query: (batch, query_heads, q_len, dim).
        mask: what the module was called with.
    """
    if not snapshot.layer.pending:
        return
    _record_rotary(module, snapshot)
    valid = _valid(readable_mask(module, mask), snapshot)
    _absorb(module, snapshot, query, valid, scaling, None)


def _record_rotary(module: nn.Module, snapshot: Snapshot) -> None:
    rows = rotary_of(module)
    snapshot.layer.record_rotary(rows, module, snapshot, lambda: _candidates(module))


def _absorb(
    module: nn.Module,
    snapshot: Snapshot,
    query: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> None:
    width = query.shape[1] * snapshot.tail_values.shape[-1]
    snapshot.layer.absorb(
        Call(
            query.detach(), valid, scaling, softcap,
            lambda: output_side(module, width, *current_block(query.shape[2])),
        )
    )  # fmt: skip


class _NoGradient(torch.autograd.Function):
    """What was computed over codes: backward through it is refused."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return refuse_gradient(gradient)


def _check(module: nn.Module, query: Tensor, snapshot: Snapshot, mask: Any) -> None:
    """What can never work on a cache that will be compressed."""
    if not query.shape[2]:
        raise UnsupportedError("a forward pass over no tokens: give at least one.")
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


def _refused(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> str:
    """Arguments that attention over codes does not implement."""
    given = [name for name in _REFUSED if kwargs.get(name) is not None]
    implied = query.shape[2] > 1 and (mask is None or mask.ndim == 2)  # the mask does not say who
    if implied and (kwargs.get("is_causal") is False or not getattr(module, "is_causal", True)):
        given.append("is_causal=False")
    if kwargs.get("output_attentions"):
        given.append("output_attentions")
    return ", ".join(given)


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
