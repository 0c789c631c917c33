"""What a test sees of profiles: their tensors, and what caches code with."""

from __future__ import annotations

from torch import Tensor

from nexusquant import NexusCache
from nexusquant.profile import SIDES, Profile
from nexusquant.tokens import CodedTokens

LONG = 530
"""Tokens that a profile can be built from."""


def bases(cache: NexusCache) -> list[set[type]]:
    """Per layer, what its keys and values are coded in."""
    found = []
    for layer in cache.layers:
        parts = [part for part in layer.stored.body if isinstance(part, CodedTokens)]
        quantizers = [q for part in parts for q in (part.key_quantizer, part.value_quantizer)]
        found.append({type(q.basis) for q in quantizers})
    return found


def tensors(profile: Profile) -> dict[str, Tensor]:
    return {
        f"{index}.{side}.{name}": x
        for index, layer in profile.layers.items()
        for side in SIDES
        for name, x in {
            **vars(getattr(layer, side)), "rank_costs": (layer.rank_costs or {})[side == "value"]
        }.items()
    }  # fmt: skip
