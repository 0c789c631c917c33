"""What single model families do differently from the rest: the one place for it.

Modules are told apart by the file they come from, such as "modeling_gptj".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.math.rope import Frequencies


@dataclass(frozen=True)
class RotaryCall:
    """The rotary rows of one call of an attention module.

    Args:
        cos, sin: (batch or 1, tokens, width).
        position_ids: (batch or 1, tokens), if known.
        source: what layers with the same rows were called with alike.
    """

    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None
    source: Tensor


def file_of(module: nn.Module) -> str:
    """The modeling file that `module` comes from."""
    return type(module).__module__.rpartition(".")[2]


def layer_of(module: nn.Module) -> int | None:
    """The layer of the cache that an attention module uses."""
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))  # GPT-Neo
    return index if isinstance(index, int) else None


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that use a cache, by name; some are within others (GPT-Neo)."""
    for name, module in model.named_modules():
        if "ttention" in type(module).__name__ and layer_of(module) is not None:
            yield name, module


# -- attention modules that get rotary rows but do not apply them (NoPE layers)

_ROTARY_RULES: dict[str, Callable[[Any], bool]] = {
    "modeling_cohere2": lambda module: module.sliding_window is not None,
    "modeling_cohere2_moe": lambda module: module.sliding_window is not None,
    **dict.fromkeys(
        ("modeling_exaone4", "modeling_exaone4_5", "modeling_exaone_moe"),
        lambda module: module.sliding_window is None or module.is_sliding,
    ),
}


def uses_rotary(module: nn.Module) -> bool:
    """Whether an attention module that is passed rotary rows applies them.

    Told by the flags that modeling files branch on.
    """
    for flag in ("use_rope", "force_rope"):
        if isinstance(getattr(module, flag, None), (bool, int)) and getattr(module, flag):
            return True
    if not getattr(module, "use_rope", True):
        return False
    rule = _ROTARY_RULES.get(file_of(module))
    return rule is None or rule(module)


# -- where rotary rows come from

# Their rows are (sin, cos). Before transformers 5.24 attention modules have the table themselves.
_SINUSOIDS = ("modeling_gptj", "modeling_codegen")
_OWN_EMBEDDING = ("modeling_moshi", "modeling_recurrent_gemma")


def rotary_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> RotaryCall | None:
    """The rows that an attention module is about to rotate with, if it can be told."""
    rows, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if torch.is_tensor(rows) and rows.is_complex():  # Llama 4
        rows = rows.real, rows.imag, rows
    if isinstance(rows, (tuple, list)) and len(rows) > 1 and torch.is_tensor(rows[0]):
        if not uses_rotary(module):
            return None
        cos, sin = rows[:2] if file_of(module) not in _SINUSOIDS else (rows[1], rows[0])
        return RotaryCall(cos, sin, positions, rows[-1] if len(rows) == 3 else rows[0])
    return _own_rows(module, args, kwargs, positions) if torch.is_tensor(positions) else None


def _own_rows(
    module: nn.Module, args: Any, kwargs: dict[str, Any], positions: Tensor
) -> RotaryCall | None:
    """The rows that a module looks up itself."""
    table, embedding = (getattr(module, x, None) for x in ("embed_positions", "rotary_emb"))
    if file_of(module) in _SINUSOIDS and torch.is_tensor(table):
        sin, cos = table.to(positions.device)[positions].chunk(2, dim=-1)
        return RotaryCall(cos, sin, positions, positions)
    stream = args[0] if args else kwargs.get("hidden_states")
    if file_of(module) in _OWN_EMBEDDING and isinstance(embedding, nn.Module):
        cos, sin = embedding(stream, positions)
        return RotaryCall(cos, sin, positions, positions)
    return None


def own_frequencies(module: nn.Module) -> list[Frequencies]:
    """Those behind that table (both have `create_sinusoidal_positions`, base 10,000)."""
    table = getattr(module, "embed_positions", None)
    if file_of(module) not in _SINUSOIDS or not torch.is_tensor(table):
        return []
    dim = table.shape[1]
    return [(1.0 / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim), 1.0)]


# -- attention modules that multiply queries and keys themselves

_SCALED_BEFORE = (
    "modeling_xglm", "modeling_trocr", "modeling_mvp", "modeling_prophetnet",
    "modeling_bigbird_pegasus", "modeling_gpt_neo",
)  # fmt: skip


def scaling_of(module: nn.Module, head_dim: int) -> float:
    """The factor on the logits of a module that does not tell anyone.

    It decides which tokens count as important, not what attention computes.
    """
    if file_of(module) in _SCALED_BEFORE:  # the queries are scaled already, or never
        return 1.0
    given = getattr(module, "softmax_scale", None)  # MPT
    return float(given) if isinstance(given, float) else 1 / math.sqrt(head_dim)


def readable_mask(module: nn.Module, mask: Any) -> Tensor | None:
    """The mask that such a module was called with, if it is sure to say who is hidden.

    None leaves padding where it is; the model goes on hiding it.
    """
    if not torch.is_tensor(mask) or mask.ndim != 4:
        return None
    if mask.dtype == torch.bool:
        return ~mask if file_of(module) == "modeling_mpt" else None  # True is hidden there
    return mask if mask.is_floating_point() else None
