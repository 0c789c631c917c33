"""Removing RoPE gives a real model's own keys from before its rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_halves

from nexusquant.frame import KeyFrame
from nexusquant.math.rope import RopeTable, capture


@dataclass(frozen=True)
class Forward:
    """What a model applied, and the keys before and after (batch, kv_heads, tokens, dim)."""

    cos: Tensor
    sin: Tensor
    before: Tensor
    after: Tensor
    frequencies: tuple[Tensor, float]


def run_llama(rope: dict[str, Any], positions: Tensor) -> Forward:
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        rope_parameters={"rope_theta": 1000.0, **rope},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    seen: dict[str, Any] = {}
    attention = model.model.layers[0].self_attn

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen["cos"], seen["sin"] = kwargs["position_embeddings"]

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.k_proj.register_forward_hook(lambda module, args, out: seen.update(k=out))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        ids = torch.randint(50, positions.shape)
        model(ids, position_ids=positions, cache=cache)
    rotary = model.model.rotary_emb
    keys = seen["k"].unflatten(-1, (1, 16)).transpose(1, 2)
    known = rotary.inv_freq, float(rotary.attention_scaling)
    return Forward(seen["cos"], seen["sin"], keys, cache.layers[0].keys, known)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("known", [True, False], ids=["compact", "copied"])
@pytest.mark.parametrize("page", [0, 1, 32])
def test_removal_gives_the_models_own_keys_before_rope(name: str, known: bool, page: int) -> None:
    padding = torch.tensor([0, 17])  # left-padded: slot and position differ per batch row
    positions = (torch.arange(50) - padding[:, None]).clamp(min=0)
    run = run_llama(ROPES[name], positions)
    assert (run.frequencies[1] != 1.0) == (name == "yarn")
    assert not torch.allclose(run.after, run.before, atol=0.01)
    table = RopeTable(apply_halves)
    table.extend(0, capture(run.cos, run.sin, positions, [run.frequencies] if known else []))
    assert (table.spans[0].rows is None) == known
    slots = torch.arange(50).view(1, 1, 50)
    frame = KeyFrame(table, page)
    torch.testing.assert_close(frame.remove(run.after, slots), run.before, rtol=1e-4, atol=1e-5)
    entered = frame.enter(run.after, slots)
    if page == 1 or (page and not known):
        torch.testing.assert_close(entered, run.before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frame.leave(entered, slots), run.after, rtol=1e-4, atol=1e-5)
    if page == 32 and known:  # keys at the start of a page are plain, in page 0 nothing is undone
        torch.testing.assert_close(entered[0, :, 32], run.before[0, :, 32], rtol=1e-4, atol=1e-5)
        unscaled = run.after[0, :, :32] / run.frequencies[1]
        torch.testing.assert_close(entered[0, :, :32], unscaled, rtol=1e-4, atol=1e-5)
