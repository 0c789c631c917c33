"""Bits per 8-dimension group: reverse water-filling over the measured distortion of our codes.

Every group has costs: what error in it does to the attention output. Of a codeword that is the mean
of what it stands for, a share D (the distortion) of the signal's variance is noise, independent
between tokens, and the signal itself has shrunk by D, in all tokens alike: damage = c D + e D^2.
Bits go, one at a time, where they lower it most per stored bit (Shoham & Gersho 1988, "Efficient
bit allocation for an arbitrary set of quantizers"). It is convex in the rate, so the greedy order
is optimal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.math.e8 import DISTORTION, GROUP


def allocate(costs: Tensor, shares: Tensor, bits: float) -> Tensor:
    """Rates that spend `bits` per dimension on average where they save most.

    Args:
        costs: (tiers, ..., 2) >= 0, c and e of every group.
        shares: (tiers,) fraction of the tokens stored in each tier.
        bits: mean rate, over groups and (weighted by their shares) tiers.

    Returns:
        Rates (tiers, ...), int64. Ties go to the lower index, so the result is
        deterministic; the budget is met up to one group's bit.
    """
    distortion = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = -torch.stack([distortion, distortion**2]).diff()
    value = costs.double().cpu().clamp(min=1e-300) @ gains
    price = shares.double().cpu().view(-1, *[1] * (costs.ndim - 2)).expand(costs.shape[:-1])
    order = value.flatten().argsort(descending=True, stable=True)
    spent = price[..., None].expand(value.shape).flatten()[order].cumsum(0)
    budget = bits * float(price.sum()) * (1 + 1e-9)
    taken = torch.zeros(value.numel(), dtype=torch.int64)
    taken[order] = (spent <= budget).long()
    return taken.view(value.shape).sum(-1)


def uniform_costs(heads: int, dim: int) -> Tensor:
    """(heads, groups, 2): all heads alike, and groups but for the order in which they get bits.

    Raises:
        UnsupportedError: `dim` is not a multiple of 8.
    """
    if dim % GROUP:
        raise UnsupportedError(f"head_dim {dim} is not a multiple of {GROUP}.")
    apart = 1 - 1e-6 * torch.arange(dim // GROUP, dtype=torch.float64)
    return torch.stack([apart, torch.zeros_like(apart)], -1).expand(heads, -1, -1)
