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
from nexusquant.hf.cache_names import CACHE_NAMES, cache_argument
from nexusquant.statistics import MIN_TOKENS

CHUNK = MIN_TOKENS  # so that the first one builds a profile if there is none
_WHOLE_CALL = ("inputs_embeds", "output_hidden_states", "output_attentions", "logits_to_keep")
_LOSS = ("num_items_in_batch", "ignore_index")


@dataclass
class Scoring:
    """A scoring call under way: the logits of all chunks but the last, and the labels."""

    logits: list[Tensor]
    labels: Tensor
    loss_arguments: dict[str, Any]


def chunk_length(tokens: int, least: int) -> int:
    """`CHUNK` tokens if the text has twice as many, else a quarter; at least what is compressed."""
    return max(least, CHUNK if tokens >= 2 * CHUNK else -(-tokens // 4))


def obstacle(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call with labels cannot be split, None if it can."""
    if model.get_output_embeddings() is None:
        return f"{type(model).__name__} is no causal language model"
    if kwargs.get("use_cache") is False:
        return "use_cache=False"
    given = [name for name in (*_WHOLE_CALL, *CACHE_NAMES) if _given(kwargs.get(name))]
    return ", ".join(given) or ("no input_ids" if kwargs.get("input_ids") is None else None)


def _given(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, int) and value == 0)


def too_short(kwargs: dict[str, Any], least: int) -> bool:
    """Whether nothing would be compressed before the last token."""
    tokens = kwargs["input_ids"].shape[1]
    return bool(tokens <= chunk_length(tokens, least))


@torch.no_grad()
def run_chunks(
    model: nn.Module, kwargs: dict[str, Any], least: int
) -> tuple[Scoring, dict[str, Any]]:
    """Run all chunks but the last; returns the state and the arguments of the last chunk."""
    kwargs = dict(kwargs)
    labels, ids = kwargs.pop("labels"), kwargs["input_ids"]
    loss_arguments = {name: kwargs.pop(name) for name in _LOSS if name in kwargs}
    tokens = ids.shape[1]
    step = chunk_length(tokens, least)
    kwargs |= {**cache_argument(model, plain_cache(model)), "use_cache": True}

    def part(begin: int, stop: int) -> dict[str, Any]:
        mine = dict(kwargs, input_ids=ids[:, begin:stop])
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mine["attention_mask"] = (
                mask[:, :stop] if mask.ndim == 2 else mask[..., begin:stop, :stop]
            )
        if kwargs.get("position_ids") is not None:
            mine["position_ids"] = kwargs["position_ids"][:, begin:stop]
        return mine

    starts = list(range(0, tokens, step))
    logits = []
    for begin in starts[:-1]:
        output = model(**dict(part(begin, begin + step), return_dict=True))
        logits.append(output.logits)
    return Scoring(logits, labels, loss_arguments), part(starts[-1], tokens)


@torch.no_grad()
def join(model: Any, scoring: Scoring, output: Any) -> Any:
    """The output of the last chunk with all logits and the loss; no gradient flows through it."""
    whole = isinstance(output, tuple)
    last = output[0] if whole else output.logits
    logits = torch.cat([*scoring.logits, last], 1)
    loss = model.loss_function(
        logits=logits, labels=scoring.labels, vocab_size=text_config(model).vocab_size,
        **scoring.loss_arguments,
    )  # fmt: skip
    if whole:
        return (loss, logits, *output[1:])
    output.logits, output.loss = logits, loss
    return output
