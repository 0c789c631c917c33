"""Rotary rows from configs, against those of transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nexusquant.errors import UnsupportedError
from nexusquant.vllm.rotary import frequencies, rotate, rows, unrotate

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def config_of(told: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5000.0, **told},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_models(kind: str) -> None:
    config = config_of(KINDS[kind])
    positions = torch.tensor([0, 1, 31, 900])
    cos, sin = rows(frequencies(config), positions)
    x = torch.randn(1, 3, 4, 16)
    expected = LlamaRotaryEmbedding(config)(x, positions[None])
    torch.testing.assert_close((cos, sin), (expected[0][0], expected[1][0]), atol=1e-4, rtol=0)
    turned = rotate(x, cos, sin)
    by_model, _ = apply_rotary_pos_emb(x, x, *expected)
    torch.testing.assert_close(turned, by_model, atol=1e-3, rtol=0)
    torch.testing.assert_close(unrotate(turned, cos, sin), x)


def test_part_of_the_dimensions() -> None:
    rope = frequencies(config_of({"rope_type": "default", "partial_rotary_factor": 0.5}))
    cos, sin = rows(rope, torch.arange(5))
    assert cos.shape == (5, 8)
    x = torch.randn(2, 5, 16)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(unrotate(turned, cos, sin), x)


def test_what_depends_on_more_than_the_position_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="dynamic"):
        frequencies(config_of({"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(UnsupportedError, match="no rotary embedding"):
        frequencies(GPT2Config())
