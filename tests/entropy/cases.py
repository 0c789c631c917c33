"""Made-up keys and values, and the storage profile of a model that would have such."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.classes import Classes
from nexusquant.entropy.profile import QueryMoments, StoreProfile
from nexusquant.math.e8 import GROUP
from nexusquant.profile import LayerProfile, Side

HEADS, KEY, VALUE, QUERIES = 2, 16, 24, 4
SHAPE = HEADS, KEY, VALUE
LAYERS = 0, 3


def side_of(heads: int, dim: int) -> Side:
    """All directions matter alike, heads do not."""
    eye = torch.eye(dim).expand(heads, dim, dim).contiguous()
    ones = torch.ones(heads, dim // GROUP)
    weight = torch.tensor([1.0, 2.0])[:heads]
    return Side(eye, eye, torch.zeros(heads, dim), ones, weight, ones)


def vectors(tokens: int, seed: int, dim: int = KEY) -> Tensor:
    """(HEADS, tokens, dim): a mean, few large directions, and something of the token before."""
    fixed = torch.Generator().manual_seed(dim)
    mix = torch.linalg.qr(torch.randn(HEADS * dim, HEADS * dim, generator=fixed))[0]
    mean = 3 * torch.randn(HEADS * dim, generator=fixed)
    spread = torch.logspace(1, -1.5, HEADS * dim)
    noise = torch.randn(tokens, HEADS * dim, generator=torch.Generator().manual_seed(seed))
    y = noise.clone()
    for t in range(1, tokens):
        y[t] = 0.8 * y[t - 1] + 0.6 * noise[t]
    return ((y * spread) @ mix.T + mean).unflatten(-1, (HEADS, dim)).transpose(0, 1)


def page(tokens: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    return vectors(tokens, seed), vectors(tokens, seed + 1000, VALUE)


def queries(seed: int = 0) -> QueryMoments:
    """Of one layer."""
    source = torch.Generator().manual_seed(seed)
    root = torch.randn(QUERIES, KEY, KEY, generator=source) / 4
    mean = torch.randn(QUERIES, KEY, generator=source)
    return QueryMoments(mean, (root @ root.mT).bfloat16())


@lru_cache(maxsize=1)
def profile() -> StoreProfile:
    """From two texts."""
    layers = {i: LayerProfile(side_of(HEADS, KEY), side_of(HEADS, VALUE)) for i in LAYERS}
    samples = {i: [Sample(*page(512, seed)) for seed in (1, 2)] for i in LAYERS}
    moments = {i: queries(i) for i in LAYERS}
    return build_profile(layers, samples, moments, "abc123", "own text, “quoted”", 1024)


def classes_of(seed: int, tokens: int, sides: tuple[int, int], span: int = 300) -> Classes:
    """Of a page with this many groups of keys and of values: any level, steps of any token."""
    r = np.random.default_rng(seed)
    groups = sum(sides)

    def levels(*shape: int) -> NDArray[np.int32]:
        return r.integers(-60, span, shape, dtype=np.int32)

    return Classes(
        np.repeat(np.arange(2, dtype=np.int32), sides), levels(2, groups),
        levels(2, groups, GROUP), r.integers(-24, 49, tokens, dtype=np.int32),
    )  # fmt: skip


def points_of(
    seed: int, shape: tuple[int, int], largest: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """n of even sums and cosets, of all sizes up to `largest`."""
    r = np.random.default_rng(seed)
    reach = np.exp(r.uniform(0, np.log(largest), (*shape, GROUP)))
    n = (reach * r.uniform(-1, 1, reach.shape)).astype(np.int32)
    n[..., 0] -= n.sum(-1) & 1
    return n, r.integers(0, 2, shape, dtype=np.int32)
