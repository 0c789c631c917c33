"""Rotary embeddings of a model from its config alone, for codecs that take RoPE off keys."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.math.rope import Frequencies

_BY_LENGTH = ("dynamic", "longrope")


def frequencies(config: Any) -> Frequencies:
    """Inverse frequencies (rotary dimensions / 2,) and the scaling of cosines and sines.

    Args:
        config: a Hugging Face config of transformers 5.

    Raises:
        UnsupportedError: the model has no rotary embedding, or one that depends on the length of
            the sequence or on the layer.
    """
    from nexusquant.hf.transformers_private import ROPE_INIT_FUNCTIONS

    config = config.get_text_config()
    told = getattr(config, "rope_parameters", None)
    if not told or "rope_theta" not in told:
        raise UnsupportedError("the model has no rotary embedding, or several.")
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise UnsupportedError("the model has no rotary embedding in some layers.")
    kind = told.get("rope_type", "default")
    if kind in _BY_LENGTH:
        raise UnsupportedError(f"rotary embeddings of type {kind} depend on the sequence's length.")
    if kind != "default":
        found, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return found, scaling
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(dim * told.get("partial_rotary_factor", 1.0))
    return told["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0


def check_rotation(config: Any, rope: Frequencies) -> None:
    """Compare `rotate` with the function that transformers has for this type of model.

    Raises:
        UnsupportedError: they differ (interleaved pairs, for one), or there is no such function.
    """
    from nexusquant.hf.transformers_private import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.get_text_config().model_type
    cos, sin = rows(rope, torch.arange(40, 44))
    x = torch.linspace(-1, 1, 8 * cos.shape[1]).view(1, 2, 4, -1)
    try:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
        turn = sys.modules[model.__module__].apply_rotary_pos_emb
        found = turn(x, x, cos[None], sin[None])[1]
    # Whatever a function of other arguments, or a type that is not known, ends in.
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"how {kind} rotates keys cannot be found out ({error}).") from error
    if found.shape != x.shape or not torch.allclose(found, rotate(x, cos, sin), atol=1e-4):
        raise UnsupportedError(f"{kind} rotates keys in another way than by halves.")


def rows(rope: Frequencies, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (tokens, rotary dimensions) fp32, of positions (tokens,).

    Columns are those of split halves (Llama, Qwen, ...): the second half repeats the first.
    """
    found, scaling = rope
    angles = positions.float()[:, None] * found.to(positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * scaling, angles.sin() * scaling


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys (..., tokens, dim) without their rotation, fp32; dimensions beyond it as they are."""
    return rotate(keys, cos, -sin, cos.square() + sin.square())


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """Keys (..., tokens, dim) with the rotation of `rows`, fp32."""
    turned, rest = keys.float().split([cos.shape[-1], keys.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = (turned * cos + torch.cat([-second, first], -1) * sin) / divisor
    return torch.cat([turned, rest], -1)
