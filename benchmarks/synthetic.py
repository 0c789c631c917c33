"""Random tokens in tiers, for times of the kernels alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nexusquant.config import PRESETS, CompressionConfig
from nexusquant.frame import KeyFrame
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import GROUP
from nexusquant.math.rope import RopeTable, Span
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens

SHARES = CompressionConfig().tier_shares


def _rates(config: CompressionConfig) -> tuple[float, ...]:
    """Mean bits per element of every tier, as where no profile knows costs by rank."""
    above = [math.log(factor, 4) for factor in config.tier_factors]
    last = config.key_bits - sum(share * x for share, x in zip(SHARES, above, strict=True))
    return tuple(last + x for x in above)


RATES = {name: _rates(PRESETS[name]) for name in ("high", "lossless")} | {
    "2 bits": (2.0,) * len(SHARES)
}
"""Bits per element of the tiers, as presets have them, or the same for all."""


def half_rotated(slots: int, dim: int) -> KeyFrame:
    """Pages of 32 slots, rotated like Llama's."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        return turn(q), turn(k)

    table = RopeTable(apply)
    frequencies = 1e4 ** (-torch.arange(dim // 2) / (dim // 2))
    table.extend(0, Span(torch.arange(slots, dtype=torch.int32)[None], frequencies))
    return KeyFrame(table, 32)


def random_tiers(keys: Tensor, values: Tensor, rates: Sequence[float]) -> list[CodedTokens]:
    """Random tokens of every head to each tier; rates that fall from group to group."""
    _, heads, tokens, dim = keys.shape
    groups = dim // GROUP
    order = torch.rand(1, heads, tokens).argsort(-1)
    unit = Centre(torch.zeros(1, heads, 1, dim).half(), torch.ones(1, heads, 1, 1).half())
    basis, parts, begin = Orthonormal("hadamard", dim), [], 0
    for share, rate in zip(SHARES, rates, strict=True):
        end = min(begin + round(share * tokens), tokens)
        index = order[..., begin:end].sort(-1).values
        begin = end
        quantizer = Quantizer(RowLayout((falling_rates(groups, rate),) * heads), basis)
        at = index[..., None].expand(-1, -1, -1, dim)
        parts.append(
            CodedTokens.encode(
                keys.gather(2, at), values.gather(2, at), Slots.of(index), (unit, unit),
                (quantizer, quantizer),
            )
        )  # fmt: skip
    return parts


def falling_rates(groups: int, rate: float) -> tuple[int, ...]:
    """Rates of `rate` bits on average; all alike at 2 bits, otherwise falling like variances do."""
    bits = [0] * groups
    for _ in range(round(rate * groups)):
        bits[min(range(groups), key=lambda g: bits[g] + 3.2 * g / groups * (rate != 2))] += 1
    return tuple(bits)
