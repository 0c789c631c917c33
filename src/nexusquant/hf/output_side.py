"""What an attention module's output goes through: its output projection, found by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexusquant.statistics import OutputSide

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "resid_proj", "output", "proj", "linear")


def output_side(module: nn.Module, width: int, residual: Tensor | None) -> OutputSide:
    """For an attention module whose heads put out `width` numbers per token in all."""
    return OutputSide(_projection(module, width), residual)


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
