"""Orthonormal transforms that spread energy evenly over the coordinates of a head."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def orthonormal(name: str, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The (dim, dim) fp32 matrix T of a transform; rows are basis vectors, T @ T.mT = I.

    "hadamard" is H_(2^a) (x) DCT_m with dim = 2^a m, m odd, and fixed random column signs (as in
    QuaRot, arXiv 2404.00456), so it exists for every dim: 64, 80, 96, 128, 256.
    """
    if name == "identity":
        return torch.eye(dim, dtype=torch.float32, device=device)
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    matrix = _dct(odd)
    while len(matrix) < dim:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]
        ) / math.sqrt(2)
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(dim)) * 2 - 1
    return (matrix * signs).float().to(device)


def _dct(n: int) -> Tensor:
    """Orthonormal DCT-II matrix, (n, n) fp64."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
