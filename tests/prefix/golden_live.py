"""Golden files of codecs "raw", "zstd" and "zstd+delta": live caches of a model without chance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nexusquant import CompressionConfig, NexusCache, save
from nexusquant.hf.snapshot import Snapshot
from nexusquant.prefix.payloads import PAYLOADS
from tests.prefix.golden_parts import FINGERPRINT, noise, npz

PROMPT, PADDING, TAIL, MORE = 140, 30, 2, 3
"""Tokens of the prompt; of the second row not there; read after it and after loading, one by one:
too few for any to be compressed."""


def model() -> Any:
    """Two layers; weights without a random number, which differ among versions of PyTorch."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=None,
            tie_word_embeddings=False, rope_theta=10_000.0,
        )
    ).eval()  # fmt: skip
    for i, (name, x) in enumerate(sorted(made.named_parameters())):
        x.data = torch.ones_like(x) if "norm" in name else noise(*x.shape, seed=i) / 4
        if "k_proj" in name:  # the second head's keys are longer
            x.data[8:] *= 2
    return made


def same_fingerprint() -> AbstractContextManager[Any]:
    """Every model has `FINGERPRINT`: of the same weights it is another where another version of
    transformers has other fields in their config."""
    return mock.patch("nexusquant.hf.fingerprint._digest", return_value=FINGERPRINT)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, tokens) ids."""
    return (noise(batch, tokens, seed=seed) * 1000).long() % 62 + 2


@torch.no_grad()
def read(owner: Any, cache: Any, begin: int, stop: int) -> np.ndarray[Any, Any]:
    """Logits of tokens `begin` to `stop` - 1: the prompt at once, others one by one."""
    batch = 1 if "klt" in cache.config.transform else 2
    ids, mask = prompt(PROMPT + TAIL + MORE, batch), torch.ones(batch, PROMPT + TAIL + MORE).long()
    mask[1:, :PADDING] = 0
    logits = []
    for first in [x for x in range(begin, stop) if x == begin or x >= PROMPT]:
        last = PROMPT if first < PROMPT else first + 1
        new = (ids * mask)[:, first:last]
        logits.append(owner(new, cache=cache, attention_mask=mask[:, :last]).logits)
    return torch.cat(logits, 1).numpy()


def without_profile(owner: Any) -> NexusCache:
    """Two rows, heads that keep different numbers of tokens."""
    settings: dict[str, Any] = {"head_safeguard": 0.1, "scorer": "key_norm", "evict_ratio": 0.5}
    return NexusCache(owner, CompressionConfig(transform="hadamard", **settings))


def with_profile(owner: Any) -> NexusCache:
    """One row, after a prompt that was long enough to build the model's profile."""
    with torch.no_grad():
        owner(prompt(500, seed=1), cache=NexusCache(owner))
    return NexusCache(owner, CompressionConfig(evict_ratio=0.3, key_bits=3, value_bits=3))


LIVE: dict[str, Callable[[Any], NexusCache]] = {
    "without-profile": without_profile,
    "with-profile": with_profile,
}


@torch.no_grad()
def held(cache: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Keys and values of all layers, zeros where tokens are gone, and which those are."""
    found = {}
    for index, layer in enumerate(cache.layers):
        tail = layer.tail
        seen = Snapshot(layer, layer.stored, tail.keys, tail.values, layer.tail_start, 0, 0)
        for which, side in enumerate(("keys", "values")):
            whole, missing = seen.filled(which)
            gone = torch.zeros(whole.shape[:3]) if missing is None else missing
            found |= {f"{index}.{side}": whole.numpy(), f"{index}.gone": gone.bool().numpy()}
    return found


def goes_on(owner: Any, cache: Any) -> np.ndarray[Any, Any]:
    """Logits of the tokens that follow what is in the files."""
    return read(owner, cache, PROMPT + TAIL, PROMPT + TAIL + MORE)


def saved(cache: Any, owner: Any, codec: str) -> bytes:
    """The file of a cache; the profile is in that of "raw"."""
    alone = len(cache.layers[0].tail.keys) == 1
    ids = prompt(PROMPT + TAIL + MORE)[:, : PROMPT + TAIL] if alone else None
    with TemporaryDirectory() as folder:
        path, embed = Path(folder) / "p", codec == "raw"
        save(cache, path, model=owner, tokens=ids, codec=codec, embed_profile=embed)
        return path.read_bytes()


def live_files(kind: str) -> dict[str, bytes]:
    """By name: a prefix per codec, what they hold, and what comes of it."""
    with same_fingerprint():
        owner = model()
        cache = LIVE[kind](owner)
        read(owner, cache, 0, PROMPT + TAIL)
        files = {f"live-v1-{kind}-{codec}.nxq": saved(cache, owner, codec) for codec in PAYLOADS}
        arrays = held(cache)
        arrays["logits"] = goes_on(owner, cache)
    return files | {f"live-v1-{kind}.npz": npz(arrays)}
