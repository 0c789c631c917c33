"""Reading the prompt a second time, for scorers that ask for it (KVzip).

The layers of the first pass keep their new tokens uncoded and wait. The same tokens are then run
again behind themselves, piece by piece: each layer notes how much attention its waiting tokens get,
the piece is taken back, and in the end the waiting tokens are compressed with what was noted.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nexusquant.config import CompressionConfig
from nexusquant.hf.cache_names import cache_argument, given_cache
from nexusquant.scorers import get_scorer
from nexusquant.scorers.kvzip import most_attention

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer
    from nexusquant.hf.tail import Call

_PIECE = 1024  # tokens that are repeated at a time
_LEAST = 32  # positions that must be left for them


def reads_twice(config: CompressionConfig, tokens: int) -> bool:
    """Whether a forward pass over so many tokens is followed by a second one."""
    used = config.evict_ratio or (config.codec == "e8" and config.tiers)
    asked = getattr(get_scorer(config.scorer), "second_pass", False)
    return bool(asked and used) and tokens >= config.least_scored


def note(layer: CompactLayer, call: Call) -> None:
    """Remember the attention that the waiting tokens of `layer` get from a repeated piece."""
    if layer.waiting is None or layer.tail is None:
        return
    most = most_attention(
        call.query, layer.tail.keys, layer.tail.count - call.query.shape[2], call.valid,
        scaling=call.scaling, softcap=call.softcap,
    )  # fmt: skip
    if layer.waiting.received is not None:
        most = torch.maximum(most, layer.waiting.received)
    layer.waiting = replace(layer.waiting, received=most)


def read_again(model: nn.Module, layers: list[CompactLayer], kwargs: dict[str, Any]) -> None:
    """Finish a forward pass over a prompt: score what waits in `layers` and compress it.

    Args:
        layers: those that the pass updated.
        kwargs: all arguments of the pass.
    """
    waiting = [layer for layer in layers if layer.waiting is not None and not layer.repeating]
    if not waiting:
        return
    left = _positions_left(model, layers, kwargs.get("position_ids"))
    obstacle = _obstacle(layers, kwargs, left)
    if obstacle:
        waiting[0].notices.warn(
            f"scorer={waiting[0].config.scorer!r} asks for a second pass over the prompt, which is"
            f" not possible ({obstacle}); it scores without."
        )
    else:
        _repeat(model, layers, kwargs, min(_PIECE, left))
    for layer in waiting:
        layer.compress_waiting()


def _positions_left(model: nn.Module, layers: list[CompactLayer], positions: Any) -> int:
    """Positions behind the prompt that the model was made for; a repeated piece takes as many."""
    config: Any = model.config
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    given = isinstance(positions, Tensor)
    return (limit or sys.maxsize) - (int(positions.max()) + 1 if given else layers[0].length)


def _obstacle(layers: list[CompactLayer], kwargs: dict[str, Any], left: int) -> str | None:
    cache, ids, mask = given_cache(kwargs), kwargs.get("input_ids"), kwargs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return "it came without token ids"
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "its attention mask does not have two dimensions"
    if cache is None or len(layers) != len(cache.layers):
        return "some of the model's layers cannot be rolled back"
    if left < min(_LEAST, ids.shape[1]):
        return f"fewer than {_LEAST} of the model's positions are left behind it"
    return None


@torch.no_grad()
def _repeat(
    model: nn.Module, layers: list[CompactLayer], kwargs: dict[str, Any], size: int
) -> None:
    """Run the prompt again in pieces of at most `size` tokens, each right behind the prompt.

    Padding moves behind its row's tokens, which thus are where they are when the row is alone.
    """
    ids, mask, positions = (kwargs.get(x) for x in ("input_ids", "attention_mask", "position_ids"))
    assert isinstance(ids, Tensor)
    settings = {**cache_argument(model, given_cache(kwargs)), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = 1
    if mask is not None:
        mask = mask.expand(len(ids), -1)
        own = mask[:, -ids.shape[1] :]
        if isinstance(positions, Tensor):
            positions = torch.where(own != 0, positions, 0)
        order = (own == 0).long().argsort(dim=1, stable=True)
        ids, own = ids.gather(1, order), own.gather(1, order)
    for layer in layers:
        layer.repeating = True
    try:
        for start in range(0, ids.shape[1], size):
            piece = ids[:, start : start + size]
            if mask is not None:
                settings["attention_mask"] = torch.cat([mask, own[:, start : start + size]], 1)
            if isinstance(positions, Tensor):
                ahead = torch.arange(1, piece.shape[1] + 1, device=positions.device)
                settings["position_ids"] = positions.amax(-1, keepdim=True) + ahead
            model(piece, **settings)
            for layer in layers:
                layer.take_back(piece.shape[1])
    finally:
        for layer in layers:
            layer.repeating = False
