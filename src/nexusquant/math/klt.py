"""The query-weighted Karhunen-Loeve transform: coordinates in which all noise matters equally.

With C the covariance of the vectors and W the metric of what their error does (x^T W x is the
squared error it causes), T = U^T W^1/2 with U the eigenvectors of W^1/2 C W^1/2. Noise of variance
s^2 in every coordinate of T x then has the cost d s^2 whatever its direction, and the coordinates
are uncorrelated with falling variance: the setting of reverse water-filling (Cover & Thomas,
Elements of Information Theory, 10.3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.05
"""Share of the mean eigenvalue added to W: directions that no query asked about still count."""


def weighted_klt(covariance: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transform, its inverse and the variances of the transformed coordinates, falling.

    Args:
        covariance, metric: (heads, dim, dim), symmetric, positive semi-definite.

    Returns:
        T (heads, dim, dim), its inverse, and diag(T C T^T) (heads, dim), all fp32.
    """
    value, vector = torch.linalg.eigh(metric.double())
    value = value.clamp(min=0) + RIDGE * value.mean(-1, keepdim=True).clamp(min=1e-30)
    root = (vector * value.sqrt()[..., None, :]) @ vector.mT
    inverse_root = (vector * value.rsqrt()[..., None, :]) @ vector.mT
    variance, basis = torch.linalg.eigh(root @ covariance.double() @ root)
    basis = basis.flip(-1)
    # The sign of an eigenvector is arbitrary: fix it, so that equal input gives equal profiles.
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    transform, inverse = basis.mT @ root, inverse_root @ basis
    return transform.float(), inverse.float(), variance.flip(-1).clamp(min=0).float()
