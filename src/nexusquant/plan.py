"""How one layer of one sequence will be coded: bases, centres and row layouts, decided once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.allocation import uniform_costs
from nexusquant.config import CompressionConfig
from nexusquant.profile import Budget, Profile
from nexusquant.quantizer import Basis, Centre, Orthonormal, Profiled, Quantizer
from nexusquant.tokens import CodedTokens

_OWN_CENTRE = 256
"""Tokens from which on a sequence's own mean is worth its bytes; a profile has one otherwise."""


@dataclass(frozen=True)
class Coding:
    """Quantizers of keys and values per tier, and the centres that all tiers share."""

    centres: tuple[Centre, Centre]
    tiers: list[tuple[Quantizer, Quantizer]]

    @staticmethod
    def of(parts: list[CodedTokens]) -> Coding:
        """How a past was coded."""
        first = parts[0]
        return Coding(
            (first.key_centre, first.value_centre),
            [(part.key_quantizer, part.value_quantizer) for part in parts],
        )


def plan_coding(
    config: CompressionConfig,
    keys: Tensor,
    values: Tensor,
    empty: Tensor,
    profile: Profile | None,
    layer: int,
) -> Coding:
    """For the first tokens of a layer: keys (in their frame) and values, (batch, heads, n, dim).

    Args:
        empty: (batch, heads or 1, n, 1) bool, entries that hold nothing.
        profile: used if the config wants one and it knows this layer.

    Raises:
        UnsupportedError: a head_dim that is not a multiple of 8.
    """
    known = profile is not None and layer in profile.layers and config.transform == "klt"
    budget = Budget(
        config.key_bits, config.value_bits, config.allocation == "joint" and known,
        config.tier_shares, config.tier_factors,
    )  # fmt: skip
    sides = (keys, values)
    if known and profile is not None:
        bases: list[Basis] = [Profiled(profile, layer, side) for side in ("key", "value")]
        if config.allocation == "uniform":
            layouts = budget.layouts([_uniform(keys, values)])[0]
        else:
            layouts = profile.layouts(layer, budget)
        centres = [_profiled_centre(x, empty, basis) for x, basis in zip(sides, bases, strict=True)]
    else:
        name = "hadamard" if config.transform == "klt" else config.transform
        bases = [Orthonormal(name, x.shape[-1]) for x in sides]
        layouts = budget.layouts([_uniform(keys, values)])[0]
        centres = [_own_centre(x, empty) for x in sides]
    key, value = (
        [Quantizer(pair[i], bases[i], config.levels, config.overload) for pair in layouts]
        for i in (0, 1)
    )
    return Coding((centres[0], centres[1]), list(zip(key, value, strict=True)))


def _uniform(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (uniform_costs(x.shape[1], x.shape[-1]) for x in (keys, values))
    return key, value


def _own_centre(x: Tensor, empty: Tensor) -> Centre:
    """Mean and deviation of every channel: without a profile, nothing else tells them apart."""
    mean, deviation = _moments(x, empty)
    usual = deviation.square().mean(-1, keepdim=True).sqrt()
    deviation = torch.where(usual > 0, deviation.clamp(min=0.05 * usual), 1.0)
    return Centre(_narrow(mean), _narrow(deviation))


def _profiled_centre(x: Tensor, empty: Tensor, basis: Basis) -> Centre:
    """Mean, and one factor per head, if there are enough tokens to tell."""
    if int((~empty).sum(2).min()) < _OWN_CENTRE:
        return Centre(None, None)
    mean = _narrow(_moments(x, empty)[0])
    y = (x - mean.float()) @ basis.forward(x.device).mT
    y = y.masked_fill(empty, 0).square().mean(-1, keepdim=True).sum(2, keepdim=True)
    scale = (y / (~empty).sum(2, keepdim=True)).sqrt()
    return Centre(mean, _narrow(torch.where(scale > 0, scale, 1.0)))


def _moments(x: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the filled entries, (batch, heads, 1, dim)."""
    filled = (~empty).sum(2, keepdim=True).clamp(min=1)
    mean = x.sum(2, keepdim=True) / filled
    variance = (x - mean).masked_fill(empty, 0).square().sum(2, keepdim=True) / filled
    return mean, variance.sqrt()


def _narrow(x: Tensor) -> Tensor:
    """In fp16 unless that would overflow or lose everything."""
    narrow = x.half()
    lossless = torch.isfinite(narrow) & ((narrow != 0) | (x == 0))
    return narrow if bool(lossless.all()) else x
