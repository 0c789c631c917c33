"""E8 without a box: the nearest lattice point, as integers, and prediction in a closed loop.

E8 = D8 u (D8 + 1/2): a point is n + c/2 in every coordinate, with integers n of even sum and one
coset bit c for all eight (Conway & Sloane 1982, "Fast quantizing and decoding algorithms").

`quantize_ref` and `reconstruct_ref` are the definition; `quantize` and `reconstruct` are the same
in compiled loops (`nexusquant.kernels.storage`), where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.kernels.storage import storage
from nexusquant.math.e8 import GROUP

NOISE = 0.07168
"""Mean squared error per dimension of E8 with volume 1 (SPLAG, table 2.3)."""
FAR = 1 << 23
"""Where coordinates are clipped: fp32 has no halves beyond, and no page holds such numbers."""


def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest points of x (..., 8): n (..., 8) int32 of even sum, coset (...) bool."""
    x = x.clamp(-FAR, FAR)
    n, far = zip(*(_nearest_even(x - half) for half in (0.0, 0.5)), strict=True)
    coset = far[1] < far[0]
    return torch.where(coset[..., None], n[1], n[0]), coset


def _nearest_even(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest integers of even sum, int32, and the squared distance to them."""
    n = x.round()
    error = x - n
    size, at = error.abs().max(-1, keepdim=True)
    n = n.int()
    odd = (n.sum(-1, keepdim=True) & 1) != 0
    step = torch.where(error.gather(-1, at) < 0, -1, 1) * odd
    far = error.square().sum(-1) + torch.where(odd, 1 - 2 * size, 0.0)[..., 0]
    return n.scatter_add(-1, at, step.to(n.dtype)), far


@dataclass(frozen=True)
class Steps:
    """How the vectors of pages are quantized, in the transform's unit, fp32.

    Attributes:
        size: (pages, tokens), step of the lattice.
        variance: (2, dim), of a page's first token, of what is left of the others after prediction.
        decay: (dim,), share of the token before in the prediction.
    """

    size: Tensor
    variance: Tensor
    decay: Tensor

    def scale(self, token: int) -> Tensor:
        """(pages, dim), factor on what is rounded to the lattice.

        A coordinate of variance v, in noise of variance d, is best guessed v / (v + d) of what is
        seen: points that are closer to 0 take fewer bits, and are as good.
        """
        size, variance = self.size[:, token, None], self.variance[min(token, 1)]
        return variance / (variance + NOISE * size.square()) / size


def quantize(y: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Pages y (pages, tokens, dim) to n (pages, tokens, dim) int32, coset (.., dim / 8) bool.

    Every token is predicted from the reconstruction of the one before; pages are independent.
    """
    fast = storage()
    if fast is None:
        return quantize_ref(y, steps)
    return fast.quantize(y, steps.size, steps.variance, steps.decay, NOISE)


def reconstruct(n: Tensor, coset: Tensor, steps: Steps) -> Tensor:
    """Inverse of `quantize` up to its error: (pages, tokens, dim) fp32."""
    fast = storage()
    if fast is None:
        return reconstruct_ref(n, coset, steps)
    return fast.reconstruct(n, coset, steps.size, steps.decay)


def quantize_ref(y: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """See `quantize`."""
    pages, tokens, dim = y.shape
    n = torch.empty(y.shape, dtype=torch.int32)
    coset = torch.empty(pages, tokens, dim // GROUP, dtype=torch.bool)
    past = torch.zeros(pages, dim)
    for t in range(tokens):
        guess = past * steps.decay
        unit = ((y[:, t] - guess) * steps.scale(t)).unflatten(-1, (dim // GROUP, GROUP))
        point, c = nearest(unit)
        n[:, t], coset[:, t] = point.flatten(1), c
        past = guess + (point + c[..., None] / 2).flatten(1) * steps.size[:, t, None]
    return n, coset


def reconstruct_ref(n: Tensor, coset: Tensor, steps: Steps) -> Tensor:
    """See `reconstruct`."""
    half = coset.repeat_interleave(GROUP, -1)
    y = (n + half / 2) * steps.size[..., None]
    for t in range(1, y.shape[1]):
        y[:, t] += y[:, t - 1] * steps.decay
    return y
