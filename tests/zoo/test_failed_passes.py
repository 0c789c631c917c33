"""Layers that are not compressed are put back, too, when a forward pass fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexusquant import NexusCache, UnsupportedError
from tests.zoo.builders import build

WITH_STATES = ("lfm2", "jamba", "falcon_h1", "qwen3_next", "zamba2", "kimi_linear", "nemotron_h")
WITH_STOCK_LAYERS = ("deepseek_v4", "minimax_m3_vl_text", "dots3_note_text")


def prompt(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, cache=cache).logits
    return logits


def twins(model_type: str, *lengths: int) -> tuple[Any, list[NexusCache]]:
    """A model and two caches of it, behind passes over so many tokens."""
    model = build(model_type)
    caches = [NexusCache(model, "high") for _ in range(2)]
    for cache in caches:
        for length in lengths:
            feed(model, cache, prompt(length))
    return model, caches


@pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning")
@pytest.mark.parametrize("tokens", [1, 2, 45])
@pytest.mark.parametrize("model_type", [*WITH_STATES, *WITH_STOCK_LAYERS])
def test_a_failed_pass_is_undone(model_type: str, tokens: int) -> None:
    model, caches = twins(model_type, 100, 1)

    def fail(*_: Any) -> None:
        raise MemoryError

    last = [x for x in model.modules() if type(x).__name__.endswith(("DecoderLayer", "Block"))][-1]
    hook = last.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        feed(model, caches[0], prompt(tokens, seed=2))
    hook.remove()
    for ids in (prompt(tokens, seed=3), prompt(1, seed=4)):
        assert torch.equal(*(feed(model, cache, ids) for cache in caches))


@pytest.mark.parametrize("model_type", ["jamba", "falcon_h1", "lfm2"])
def test_a_state_that_cannot_be_rolled_back_refuses_before_anything_changes(
    model_type: str,
) -> None:
    model, caches = twins(model_type, 40, 5)
    with pytest.raises(UnsupportedError, match="cannot be rolled back"):
        caches[0].crop(-2)
    assert torch.equal(*(feed(model, cache, prompt(3)) for cache in caches))
