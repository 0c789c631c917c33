"""First and second moments of one layer's keys or values, from which its transforms follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.math.e8 import GROUP
from nexusquant.math.klt import weighted_klt
from nexusquant.profile import Side

RIDGE = 1e-2
"""Share of the mean variance added in all directions: no text shows all that will be seen."""


@dataclass(frozen=True)
class Moments:
    """Per KV head: mean (heads, dim), covariance and metric (heads, dim, dim), weight (heads,).

    Attributes:
        added: (heads, dim, dim) second moment of what the vectors add to the attention output, 0
            where they add up to nothing of interest (keys).
    """

    mean: Tensor
    covariance: Tensor
    metric: Tensor
    weight: Tensor
    added: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        metric: Tensor,
        weight: Tensor,
        attention: Tensor,
        attended: float,
        added: Tensor | None = None,
    ) -> Moments:
        """Moments of x (heads, n, dim) fp32.

        Args:
            attention: (heads, n), how much error in each vector matters, in any unit.
            attended: share of it in the covariance; otherwise all vectors count the same. The few
                that everybody attends to may be unlike all others.
        """
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-30)
        each = (1 - attended) / x.shape[1] + attended * attention
        covariance = (centred * each[..., None]).mT @ centred
        added = torch.zeros_like(metric) if added is None else added
        return cls(mean[:, 0], (covariance + covariance.mT) / 2, metric, weight, added)

    @classmethod
    def average(cls, parts: list[Moments]) -> Moments:
        """Of several texts, each counting the same."""
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.stack(column).mean(0) for column in fields))

    def to(self, device: str) -> Moments:
        """A copy on another device."""
        return Moments(*(x.to(device, copy=True) for x in vars(self).values()))

    def side(self) -> Side:
        """Transform, variances, and the scaling of every group to unit variance."""
        size = self.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        noise = RIDGE * size * torch.eye(self.covariance.shape[-1], device=size.device)
        transform, inverse, spectrum = weighted_klt(self.covariance + noise, self.metric)
        variance = spectrum.unflatten(-1, (-1, GROUP)).mean(-1)
        floor = variance.amax(-1, keepdim=True).clamp(min=1e-20) * 1e-9
        deviation = variance.clamp(min=floor).sqrt().repeat_interleave(GROUP, -1)
        return Side(
            transform / deviation[..., None], inverse * deviation[..., None, :], self.mean,
            variance, self.weight, self._coherence(transform, variance.clamp(min=floor)),
        )  # fmt: skip

    def _coherence(self, transform: Tensor, variance: Tensor) -> Tensor:
        """(heads, groups) >= 1: what groups add to the output over what they would as noise."""
        added = (transform @ self.added @ transform.mT).diagonal(dim1=-2, dim2=-1)
        added = added.unflatten(-1, (-1, GROUP)).mean(-1)
        return (added / (self.weight[:, None] * variance).clamp(min=1e-30)).clamp(min=1.0)
