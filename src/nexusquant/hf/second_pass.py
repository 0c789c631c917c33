"""Reading the prompt a second time, for scorers that ask for it (KVzip).

The layers of the first pass keep their new tokens uncoded and wait. The same tokens are then run
again behind themselves, piece by piece: each layer notes how much attention its waiting tokens get,
the piece is taken back, and in the end the waiting tokens are compressed with what was noted.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nexusquant.config import CompressionConfig
from nexusquant.scorers import get_scorer
from nexusquant.scorers.kvzip import most_attention

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer
    from nexusquant.hf.tail import Call

_PIECE = 1024  # tokens that are repeated at a time


def reads_twice(config: CompressionConfig, tokens: int) -> bool:
    """Whether a forward pass over so many tokens is followed by a second one."""
    used = config.evict_ratio or (config.codec == "e8" and config.tiers)
    asked = getattr(get_scorer(config.scorer), "second_pass", False)
    return bool(asked and used) and tokens >= config.residual_length


def note(layer: CompactLayer, call: Call) -> None:
    """Remember the attention that the waiting tokens of `layer` get from a repeated piece."""
    if layer.waiting is None or layer.tail is None:
        return
    new = call.query.shape[2]
    valid = layer.waiting.valid
    most = most_attention(
        call.query, layer.tail.keys, layer.tail.count - new,
        None if valid is None else nn.functional.pad(valid, (0, new), value=True),
        scaling=call.scaling, softcap=call.softcap,
    )  # fmt: skip
    if layer.waiting.received is not None:
        most = torch.maximum(most, layer.waiting.received)
    layer.waiting = replace(layer.waiting, received=most)


def read_again(
    model: nn.Module, layers: list[CompactLayer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Finish a forward pass over a prompt: score what waits in `layers` and compress it.

    Args:
        layers: those that the pass updated.
        args, kwargs: of the pass.
    """
    waiting = [layer for layer in layers if layer.waiting is not None and not layer.repeating]
    if not waiting:
        return
    cache, ids = kwargs.get("past_key_values"), args[0] if args else kwargs.get("input_ids")
    obstacle = _obstacle(cache, layers, ids)
    if obstacle:
        waiting[0].notices.warn(
            f"scorer='kvzip' cannot read this prompt a second time ({obstacle}); expected attention"
            " decides instead."
        )
    else:
        assert isinstance(ids, Tensor)
        _repeat(model, layers, cache, ids, kwargs)
    for layer in waiting:
        layer.compress_waiting()


def _obstacle(cache: Any, layers: list[CompactLayer], ids: Any) -> str | None:
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return "it came without token ids"
    if cache is None or len(layers) != len(cache.layers):
        return "some of the model's layers cannot be rolled back"
    return None


@torch.no_grad()
def _repeat(
    model: nn.Module,
    layers: list[CompactLayer],
    cache: Any,
    ids: Tensor,
    kwargs: dict[str, Any],
) -> None:
    settings: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = 1
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    for layer in layers:
        layer.repeating = True
    try:
        for piece in ids.split(_PIECE, dim=1):
            count = piece.shape[1]
            if mask is not None:
                settings["attention_mask"] = nn.functional.pad(mask, (0, count), value=1)
            if isinstance(positions, Tensor):
                ahead = torch.arange(1, count + 1, device=positions.device)
                settings["position_ids"] = positions.amax(-1, keepdim=True) + ahead
            model(piece, **settings)
            for layer in layers:
                layer.take_back(count)
    finally:
        for layer in layers:
            layer.repeating = False
