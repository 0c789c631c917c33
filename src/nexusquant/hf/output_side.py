"""What an attention module's output goes through and who reads it: layers found by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexusquant.residual import OutputSide

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "resid_proj", "output", "proj", "linear")
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_READERS = (
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "ln_1", "ln_2",
    "norm_1", "norm_2", "ln_attn", "ln_mlp",
)  # fmt: skip


def output_side(
    module: nn.Module, width: int, block: nn.Module | None, residual: Tensor | None
) -> OutputSide:
    """For an attention module whose heads put out `width` numbers per token in all.

    Args:
        block: the decoder layer that it is in.
        residual: (batch, tokens, hidden) what came into that layer.
    """
    projection, norm = _projection(module, width), _norm_behind(block)
    if projection is None:
        return OutputSide(None, residual)
    readers = [_gain(reader, projection) for reader in _readers(block)]
    known = [gain for gain in readers if gain is not None]
    stacked = torch.stack(known) if known else None
    if norm is None:
        return OutputSide(projection, residual, None, stacked)
    behind = _gain(norm, projection)
    return OutputSide(projection, None if behind is None else residual, behind, stacked)


def _gain(norm: nn.Module, like: Tensor) -> Tensor | None:
    """(hidden,) what a norm multiplies every channel with; of some, the weight counts from 1.

    None unless it is one with a weight per channel.
    """
    weight = getattr(norm, "weight", None)
    kind = type(norm).__name__
    if not torch.is_tensor(weight) or weight.shape != (len(like),) or weight.is_meta:
        return None
    if "RMSNorm" not in kind:
        return weight.detach().float() if kind == "LayerNorm" else None
    with torch.no_grad():
        return norm(torch.ones(len(like), device=weight.device)).float()


def _norm_behind(block: nn.Module | None) -> nn.Module | None:
    """The norm that the attention output goes through before it is added (Gemma 2, OLMo 2, GLM 4).

    Most models have a `post_attention_layernorm`, too, before their MLP.
    """
    name = "post_attention_layernorm" if hasattr(block, "post_feedforward_layernorm") else ""
    return getattr(block, "post_self_attn_layernorm", getattr(block, name, None))


def _readers(block: nn.Module | None) -> list[nn.Module]:
    """Norms of the layer that read the residual stream, before attention and before the MLP."""
    behind = _norm_behind(block)
    found = [getattr(block, name, None) for name in _READERS]
    return [norm for norm in found if norm is not None and norm is not behind]


def _projection(module: nn.Module, width: int) -> Tensor | None:
    """(hidden, width) weight, or None if there is none by any usual name, or it is quantized."""
    for name in _NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        if not torch.is_tensor(weight) or weight.ndim != 2 or weight.dtype not in _PLAIN:
            continue
        if weight.is_meta:
            return None
        if weight.shape[1] == width and not _is_conv1d(getattr(module, name)):
            return weight.detach()
        if weight.shape[0] == width:
            return weight.detach().mT
    return None


def _is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed, which a square shape does not show."""
    return type(layer).__name__ == "Conv1D"
