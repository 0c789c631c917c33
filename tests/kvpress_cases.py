"""A press of our own, and how the tests look at what presses leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant import CompressionConfig
from nexusquant.hf.cache_names import given_cache

EXACT = CompressionConfig(codec="exact", sinks=0, recent=0)


class KeyNormPress:
    """What we use of a kvpress press, for versions of transformers that its hooks do not know."""

    def __init__(self, compression_ratio: float, changes: bool = False) -> None:
        self.compression_ratio, self.changes = compression_ratio, changes

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor,
        attentions: Tensor | None, kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """(batch, kv_heads, tokens)."""
        assert attentions is None
        assert kwargs["hidden_states"].shape == hidden_states.shape
        return -keys.norm(dim=-1)

    def hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """As `BasePress.forward_hook` and `ScorerPress.compress`."""
        layer, tokens = given_cache(kwargs).layers[module.layer_idx], kwargs["hidden_states"]
        if layer.get_seq_length() != tokens.shape[1]:
            return
        keys, values = layer.keys, layer.values
        scores = self.score(module, tokens, keys, values, output[1], kwargs)
        kept = int(keys.shape[2] * (1 - self.compression_ratio))
        index = scores.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
        layer.keys = keys.gather(2, index) * (2 if self.changes else 1)
        layer.values = values.gather(2, index)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        hooks = [
            layer.self_attn.register_forward_hook(self.hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def pressed(press: Any, model: Any, cache: Any, ids: Tensor, more: Tensor) -> tuple[Tensor, Any]:
    """Logits of `more` behind `ids`, which the press has pruned, and the cache."""
    with press(model):
        model(ids, cache=cache)
    start = ids.shape[1]
    positions = torch.arange(start, start + more.shape[1])[None]
    return model(more, cache=cache, position_ids=positions).logits, cache


def slots(cache: Any, layer: int) -> list[set[int]]:
    """The positions stored, per head."""
    heads: list[set[int]] = [set() for _ in range(2)]
    for part in cache.layers[layer].stored.parts():
        at = part.slots.positions("cpu").expand(1, part.kv_heads, -1)[0]
        for head, row in zip(part.heads or range(2), at.tolist(), strict=True):
            heads[head] |= {slot for slot in row if slot >= 0}
    return heads
