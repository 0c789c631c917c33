"""Scalar Lloyd-Max quantization behind a random rotation, the class of TurboQuant (2504.19874)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def lloyd_max_levels(bits: int) -> Tensor:
    """The 2**bits reconstruction levels of least squared error for a unit Gaussian, rising.

    Lloyd's two conditions in turn: boundaries halfway between levels, levels at the mean of their
    cell (Max 1960). float64.
    """
    count = 2**bits
    edges = torch.arange(1, 2 * count, 2, dtype=torch.float64) / count - 1
    levels = math.sqrt(2) * torch.special.erfinv(edges)  # the cells' medians, to start from
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(4000):
        ends = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
        below = (1 + torch.erf(ends / math.sqrt(2))) / 2
        levels = -density.diff() / below.diff()
    return levels


@cache
def random_rotation(dim: int, seed: int = 0) -> Tensor:
    """A (dim, dim) orthogonal matrix, uniformly drawn; float32."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def round_trip(x: Tensor, bits: int) -> Tensor:
    """x (..., dim) as it comes back: fp16 norm per vector, `bits` bits per rotated coordinate."""
    dim = x.shape[-1]
    rotation = random_rotation(dim).to(x.device)
    levels = lloyd_max_levels(bits).to(x.device, torch.float32)
    norm = x.float().norm(dim=-1, keepdim=True).half().float()
    scale = norm / math.sqrt(dim)  # rotated coordinates are close to N(0, scale^2)
    u = x.float() @ rotation / scale.clamp_min(1e-8)
    nearest = torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale @ rotation.T).to(x.dtype)


def bits_per_element(bits: int, dim: int, tokens: int, exact: int = 0) -> float:
    """Codes and one fp16 norm per vector, `exact` of the `tokens` tokens kept in fp16."""
    return ((tokens - exact) * (bits + 16 / dim) + exact * 16) / tokens
