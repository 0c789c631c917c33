"""The query-weighted Karhunen-Loeve transform: coordinates in which all noise matters equally.

With C the covariance of the vectors and W = L L^T the metric of what their error does (x^T W x is
the squared error it causes), T = U^T L^T with U the eigenvectors of L^T C L. Noise of variance s^2
in every coordinate of T x then has the cost d s^2 whatever its direction, and the coordinates are
uncorrelated with falling variance: the setting of reverse water-filling (Cover & Thomas,
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
    ridge = RIDGE * metric.diagonal(dim1=-2, dim2=-1).double().mean(-1).clamp(min=1e-30)
    eye = torch.eye(metric.shape[-1], dtype=torch.float64, device=metric.device)
    root = torch.linalg.cholesky(metric.double() + ridge[:, None, None] * eye)
    variance, basis = torch.linalg.eigh(root.mT @ covariance.double() @ root)
    basis = basis.flip(-1)
    # The sign of an eigenvector is arbitrary: fix it, so that equal input gives equal profiles.
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    transform = basis.mT @ root.mT
    inverse = torch.linalg.solve_triangular(root.mT, basis, upper=True)
    return transform.float(), inverse.float(), variance.flip(-1).clamp(min=0).float()
