"""What an attention module's output goes through: projection and norm, found by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexusquant.statistics import OutputSide

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "resid_proj", "output", "proj", "linear")


def output_side(
    module: nn.Module, width: int, block: nn.Module | None, residual: Tensor | None
) -> OutputSide:
    """For an attention module whose heads put out `width` numbers per token in all.

    Args:
        block: the decoder layer that it is in.
        residual: (batch, tokens, hidden) what came into that layer.
    """
    projection, norm = _projection(module, width), _norm_behind(block)
    if projection is None or norm is None:
        return OutputSide(projection, residual)
    if "RMSNorm" not in type(norm).__name__:
        return OutputSide(projection)
    with torch.no_grad():
        weight = norm(torch.ones(len(projection), device=projection.device)).float()
    return OutputSide(projection.float() * weight[:, None], residual, float(weight.square().sum()))


def _norm_behind(block: nn.Module | None) -> nn.Module | None:
    """The norm that the attention output goes through before it is added (Gemma 2, OLMo 2, GLM 4).

    Most models have a `post_attention_layernorm`, too, before their MLP.
    """
    name = "post_attention_layernorm" if hasattr(block, "post_feedforward_layernorm") else ""
    return getattr(block, "post_self_attn_layernorm", getattr(block, name, None))


def _projection(module: nn.Module, width: int) -> Tensor | None:
    """(hidden, width) weight, or None if there is none by any usual name, or it is quantized."""
    for name in _NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        if not torch.is_tensor(weight) or weight.ndim != 2 or not weight.is_floating_point():
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
