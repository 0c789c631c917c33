"""What future queries are expected to look at, and what the latest ones did look at, together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs, causal_attention
from nexusquant.scorers.expected_attention import ExpectedAttention

_WEIGHTS = 1 << 20  # in fp32 at once: what caches of CPUs hold


@dataclass(frozen=True)
class ExpectedAndObserved:
    """The mean of two ranks: by expected attention, and by squared attention of late queries.

    Noise on a key or value reaches the output with the square of its attention weight, so it is
    squares that are added up over the last `window` queries (the window of SnapKV, Li et al. 2024,
    arXiv 2404.14469). A forecast from the statistics of all queries and a look at the latest ones
    err in different places. Ranks are within a head; so that heads can be compared, the token of
    the r-th rank gets the r-th highest score of expected attention there.
    """

    window: int = 64
    expected: ExpectedAttention = field(default_factory=ExpectedAttention)

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32, 0 at padding."""
        expected = self.expected.score(inputs)
        hidden = ~inputs.valid_mask()[:, None]
        ranks = _ranks(expected, hidden) + _ranks(self._observed(inputs), hidden)
        ordered = expected.masked_fill(hidden, -1.0).sort(dim=-1).values
        return ordered.gather(-1, _ranks(ranks, hidden)).masked_fill(hidden, 0.0)

    def _observed(self, inputs: ScoreInputs) -> Tensor:
        """Sum of squared weights of each row's last queries, `(batch, kv_heads, tokens)`."""
        valid, held = inputs.valid_mask(), inputs.keys.shape[2] - inputs.queries.shape[2]
        behind = valid.flip(-1).cumsum(-1).flip(-1)  # 1 at a row's last valid token
        voters = (valid & (behind <= self.window))[:, held:]
        first = held + int((~voters.any(0)).long().cumprod(0).sum())
        queries, voters = inputs.queries[:, :, first - held :], voters[:, first - held :]
        observed = torch.zeros(inputs.keys.shape[:3], device=inputs.keys.device)
        step = max(_WEIGHTS // (len(queries) * queries.shape[1] * inputs.keys.shape[2]), 1)
        for block in queries.split(step, dim=2):
            weights = causal_attention(
                block, inputs.keys, inputs.valid, first=first, scaling=inputs.scaling,
                softcap=inputs.softcap,
            )  # fmt: skip
            if not bool(voters[:, :step].all()):
                weights *= voters[:, None, None, :step, None]
            observed += weights.square_().sum((2, 3))
            first, voters = first + step, voters[:, step:]
        return observed


def _ranks(scores: Tensor, hidden: Tensor) -> Tensor:
    """0 for the lowest along the last axis, hidden ones first; of equal ones the earlier wins."""
    order = scores.float().masked_fill(hidden, -torch.inf).flip(-1).argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).flip(-1)
