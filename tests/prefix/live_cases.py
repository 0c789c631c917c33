"""Caches for the tests of live files, and how they are sent through one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexusquant import nxq
from nexusquant.hf.profiles import remember_profile
from nexusquant.prefix.companion import STREAM, held
from nexusquant.prefix.live import live_profile, live_streams, load_live
from nexusquant.profile_store import profile_bytes
from tests.hf.models import prompt

UNEVEN: dict[str, Any] = {"head_safeguard": 0.1, "evict_ratio": 0.6, "scorer": "key_norm"}
"""Settings with which heads keep different numbers of tokens."""


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    logits: Tensor = model(ids, cache=cache, attention_mask=mask).logits
    return logits


def packed(cache: Any, *args: Any, with_profile: bool = False, **kwargs: Any) -> bytes:
    meta, streams = live_streams(cache, *args, **kwargs)
    profile = live_profile(cache)
    held = {STREAM: [profile_bytes(profile)]} if with_profile and profile else {}
    return nxq.pack(meta, {**held, **streams})


def loaded(data: bytes, model: Any, profile: Any = None) -> Any:
    with nxq.Reader.open(data) as reader:
        return load_live(reader, model, profile, lambda digest: held(reader, None, digest))


def sent(cache: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The cache from a file of it, which holds the same bits in as many bytes."""
    if cache.profile is not None:
        remember_profile(model, cache.profile)  # the file does not hold it
    data = packed(cache, *args, **kwargs)
    again = loaded(data, model)
    assert packed(again, *args, **kwargs) == data
    assert again.nbytes == cache.nbytes
    return again


def go_on_alike(model: Any, caches: tuple[Any, Any], counts: tuple[int, ...] = (3, 40, 1)) -> None:
    """Both give the same logits, to the bit, for the tokens that follow, and stay alike."""
    for i, count in enumerate(counts):
        ids = prompt(count, caches[0].layers[0].batch_size, seed=i)
        assert torch.equal(*(feed(model, each, ids) for each in caches))
    assert caches[0].nbytes == caches[1].nbytes
