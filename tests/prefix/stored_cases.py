"""Models with storage profiles, their caches, and how far apart two continuations are."""

from __future__ import annotations

import copy
import random
from functools import cache as once
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nexusquant import calibrate_store
from nexusquant.entropy.profile import StoreProfile
from nexusquant.hf.cache import plain_cache
from tests.hf.models import generate, tiny
from tests.zoo.builders import build

KINDS = ("llama", "qwen2", "bfloat16", "gemma3", "smollm3", "cohere2")
"""gemma3: sliding windows, two RoPE flavours; smollm3, cohere2: both, and layers without RoPE."""
WORDS = 90


def ids(tokens: int, seed: int = 1) -> Tensor:
    """(1, tokens) of a language of 40 words, each of which is 1 to 4 of `WORDS` tokens."""
    source = random.Random(seed)
    words = [random.Random(i).choices(range(2, WORDS), k=1 + i % 4) for i in range(40)]
    found: list[int] = []
    while len(found) < tokens:
        found += words[int(40 * source.random() ** 2)]
    return torch.tensor([found[:tokens]])


def tokenizer(text: str, **_: Any) -> Any:
    """Texts are seeds."""
    return SimpleNamespace(input_ids=ids(1024, int(text)))


def model_of(kind: str, seed: int = 0) -> Any:
    """A fresh one; the same every time."""
    if kind in ("smollm3", "cohere2", "falcon_h1", "gemma3n_text"):
        return build(kind, seed)
    if kind in ("gemma3", "mistral"):
        return tiny(kind, seed=seed, sliding_window=48)
    if kind == "bfloat16":
        return tiny(seed=seed).bfloat16()
    return tiny(kind, seed=seed)


@once
def case(kind: str) -> tuple[Any, StoreProfile]:
    """A model and its storage profile."""
    model = model_of(kind)
    return model, calibrate_store(model, tokenizer, ["100", "101"], tokens=512, pieces=4)


@torch.no_grad()
def read(model: Any, prefix: Tensor, cache: Any = None) -> Any:
    """A cache that holds a prefix."""
    cache = plain_cache(model) if cache is None else cache
    model(prefix, cache=cache)
    return cache


@torch.no_grad()
def divergence(model: Any, stock: Any, cache: Any, tokens: int = 16) -> float:
    """Mean KL of the next tokens, in nats. Neither cache is changed."""
    more = ids(tokens, seed=3)
    p, q = (
        model(more, cache=copy.deepcopy(x)).logits.float().log_softmax(-1) for x in (stock, cache)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


def go_on(model: Any, prefix: Tensor, cache: Any, new: int = 12) -> Tensor:
    """The sequence that greedy generation makes of a prefix and three tokens more."""
    asked = torch.cat([prefix, ids(3, seed=5)], 1)
    found: Tensor = generate(model, asked, new, cache=cache).sequences
    return found


def pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of two stock caches, layer by layer."""
    both = zip(one.layers, other.layers, strict=True)
    return [pair for a, b in both for pair in ((a.keys, b.keys), (a.values, b.values))]
