"""`model(ids, labels=ids)` inside a block must see compressed history, or it measures nothing.

A single forward attends to exact keys throughout, so the call is split: chunk after chunk goes
through the cache, each seeing the compressed ones before it, and logits and loss are put together
as if it had been one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.hf.cache import plain_cache, text_config

CHUNK = 256
_WHOLE_CALL = ("output_hidden_states", "output_attentions", "logits_to_keep", "inputs_embeds")


@dataclass
class Scoring:
    """A scoring call under way: the logits of all chunks but the last, and the labels."""

    logits: list[Tensor]
    labels: Tensor


def chunk_length(tokens: int, residual_length: int) -> int:
    """Tokens per chunk: a quarter of the text, at most 256, at least what gets compressed."""
    return max(residual_length, min(CHUNK, -(-tokens // 4)))


def splittable(kwargs: dict[str, Any], residual_length: int) -> bool:
    """Whether a forward call with these arguments is a scoring call we can split."""
    ids = kwargs.get("input_ids")
    return (
        kwargs.get("labels") is not None
        and ids is not None
        and kwargs.get("past_key_values") is None
        and kwargs.get("use_cache") is not False
        and not any(kwargs.get(name) for name in _WHOLE_CALL if name != "inputs_embeds")
        and kwargs.get("inputs_embeds") is None
        and ids.shape[1] > chunk_length(ids.shape[1], residual_length)
    )


@torch.no_grad()
def run_chunks(
    model: nn.Module, kwargs: dict[str, Any], residual_length: int
) -> tuple[Scoring, dict[str, Any]]:
    """Run all chunks but the last; returns the state and the arguments of the last chunk."""
    kwargs = dict(kwargs)
    labels, ids = kwargs.pop("labels"), kwargs["input_ids"]
    tokens = ids.shape[1]
    step = chunk_length(tokens, residual_length)
    kwargs["past_key_values"] = plain_cache(model)
    kwargs["use_cache"] = True

    def part(begin: int, stop: int) -> dict[str, Any]:
        mine = dict(kwargs, input_ids=ids[:, begin:stop])
        if kwargs.get("attention_mask") is not None:
            mine["attention_mask"] = kwargs["attention_mask"][:, :stop]
        if kwargs.get("position_ids") is not None:
            mine["position_ids"] = kwargs["position_ids"][:, begin:stop]
        return mine

    starts = list(range(0, tokens, step))
    logits = []
    for begin in starts[:-1]:
        output = model(**dict(part(begin, begin + step), return_dict=True))
        logits.append(output.logits)
    return Scoring(logits, labels), part(starts[-1], tokens)


@torch.no_grad()
def join(model: Any, scoring: Scoring, output: Any) -> Any:
    """The output of the last chunk with all logits and the loss; no gradient flows through it."""
    whole = isinstance(output, tuple)
    last = output[0] if whole else output.logits
    logits = torch.cat([*scoring.logits, last], 1)
    vocab = text_config(model).vocab_size
    loss = model.loss_function(logits=logits, labels=scoring.labels, vocab_size=vocab)
    if whole:
        return (loss, logits, *output[1:])
    output.logits, output.loss = logits, loss
    return output
