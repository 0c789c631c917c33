"""Tiny random models of every kind the integration tests need, and how the tests drive them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nexusquant import CompressionConfig, nexusquant_evict

VOCAB = 96
WINDOW = 24
KINDS = ("llama", "mistral", "mistral_full", "qwen2", "gemma3", "gpt_neox")
ATTENTIONS = ("sdpa", "eager")
LOGIT_TOLERANCE = 1e-4

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    # Wide enough that attention is far from uniform and greedy choices are far from ties.
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}


def tiny(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode: 3 layers (mistral and gemma3 with sliding windows of 24 tokens).

    gpt2 and opt have learned positions.
    """
    torch.manual_seed(seed)
    builders: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
        "llama": (LlamaConfig, LlamaForCausalLM, _GQA),
        "mistral": (MistralConfig, MistralForCausalLM, {**_GQA, "sliding_window": WINDOW}),
        "mistral_full": (MistralConfig, MistralForCausalLM, {**_GQA, "sliding_window": None}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
        "gemma3": (
            Gemma3TextConfig,
            Gemma3ForCausalLM,
            {
                **_GQA,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "query_pre_attn_scalar": 16,
                "rope_parameters": _GEMMA_ROPE,
            },
        ),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"rotary_pct": 0.5}),
        "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
        "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    }
    config_class, model_class, own = builders[kind]
    config = config_class(**{**_SHAPE, **own, **changes})
    config._attn_implementation = attention
    model = model_class(config).eval()
    if kind == "qwen2":  # its biases start at zero, where they would prove nothing
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    """(batch, tokens) random ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, tokens), generator=generator)


def left_padded(lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), each (batch, longest)."""
    ids = prompt(max(lengths), len(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
    return ids * mask, mask


@torch.no_grad()
def generate(model: PreTrainedModel, ids: Tensor, new: int = 12, **kwargs: Any) -> Any:
    """Greedy `generate` with the logits of every step."""
    settings = {"do_sample": False, "min_new_tokens": new, **kwargs}
    return model.generate(
        ids,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


def step_logits(output: Any) -> Tensor:
    """(batch, steps, vocab) fp32 of a `generate` output."""
    return torch.stack(output.logits, 1).float()


def assert_same_run(ours: Any, stock: Any, tolerance: float = LOGIT_TOLERANCE) -> None:
    """Equal token for token, logits within `tolerance`."""
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(step_logits(ours), step_logits(stock), rtol=0, atol=tolerance)


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, step: int, mask: Tensor | None = None) -> Tensor:
    """Prefill by hand; logits of all tokens."""
    parts = []
    for begin in range(0, ids.shape[1], step):
        stop = begin + step
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, begin:stop], attention_mask=seen, cache=cache)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def assert_rows_equal_alone(
    model: Any, ids: Tensor, lengths: list[int], settings: CompressionConfig, batch: Any
) -> None:
    """Every left-padded row of a batch is generated as it would be without the others."""
    for row, length in enumerate(lengths):
        with nexusquant_evict(model, settings):
            single = generate(model, ids[row : row + 1, -length:])
        assert torch.equal(single.sequences[0, length:], batch.sequences[row, ids.shape[1] :])
        torch.testing.assert_close(
            step_logits(single)[0], step_logits(batch)[row], rtol=0, atol=1e-4
        )
