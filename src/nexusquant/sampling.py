"""How much of a prompt the statistics of a layer look at, and that part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.rank_costs import later_queries
from nexusquant.residual import OutputSide


@dataclass(frozen=True)
class Sampling:
    """How much of a prompt the statistics look at.

    Attributes:
        queries: per KV head, at least a quarter of them per query head.
        asked: one query in so many is followed to the output, which is the costly part.
        keys: keys and values, evenly spaced, that the covariances are of at least.
        pages: pages of keys, evenly spaced, that the key metric looks at.
        influence: share of influence in the key metric.
        attended: share of attention in the covariances.
    """

    queries: int
    asked: int
    keys: int
    pages: int
    influence: float
    attended: float


PREFILL = Sampling(queries=256, asked=8, keys=768, pages=8, influence=0.25, attended=0.5)
"""In passing: cheap, and careful with the influence of the few queries asked."""

CALIBRATION = Sampling(queries=512, asked=2, keys=1 << 20, pages=16, influence=0.5, attended=0.5)
"""When there is time."""


@dataclass(frozen=True)
class Sample:
    """One row's chunk without padding."""

    framed: Tensor  # (kv_heads, m, dim) fp32: some of the keys, in the frame
    keys: Tensor  # (kv_heads, n, dim) fp32, as rotated by the model
    values: Tensor  # (kv_heads, n, value_dim) fp32
    queries: Tensor  # (query_heads, sampled, dim), post-RoPE
    query_at: Tensor  # (sampled,) indices into the keys
    slots: Tensor  # (n,)
    stream: Tensor | None  # (sampled, hidden) residual stream at the queries
    inverse_residual: Tensor  # (sampled,)
    every_query: Tensor  # (query_heads, q, dim), post-RoPE, of the last q tokens
    later_inverse_residual: Tensor  # (later queries,)
    skip: int  # leading keys that are stored exactly
    some: slice  # which keys are in `framed`
    sampling: Sampling


def sample_of(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    row: int,
    start: int,
    valid: Tensor | None,
    frame: KeyFrame,
    sinks: int,
    output: OutputSide,
    sampling: Sampling,
) -> Sample:
    """The row's real tokens and some of its queries, evenly spaced over the last three quarters."""
    tokens, q_len = keys.shape[2], queries.shape[2]
    everything = torch.arange(tokens, device=keys.device)
    real = everything if valid is None else everything[valid[row]]
    slots = real + start
    first = max(len(real) // 4, int((real < tokens - q_len).sum()))
    group = queries.shape[1] // keys.shape[1]
    count = min(max(sampling.queries // group, sampling.queries // 4), len(real) - first)
    at = torch.linspace(first, len(real) - 1, count, device=keys.device).round().long()
    chosen = queries[row][:, real[at] - (tokens - q_len)].float()
    later = later_queries(len(real))[1].to(keys.device)
    stream, inverse = None, torch.ones(count, device=keys.device)
    later_inverse = torch.ones(len(later), device=keys.device)
    if output.complete and output.residual is not None:
        residual = output.residual.to(keys.device)[row]
        stream = residual[real[at] - tokens].float()
        inverse, later_inverse = (
            1 / x.float().square().sum(-1).clamp(min=1e-12)
            for x in (stream, residual[real[later] - tokens])
        )
    mine, its = keys[row], values[row]
    every = queries[row]
    if valid is not None:
        known = real[real >= tokens - q_len] - (tokens - q_len)
        mine, its, every = mine[:, real], its[:, real], every[:, known]
    skip = sinks if start == 0 else 0
    some = slice(skip, None, max(1, len(real) // sampling.keys))
    framed = frame.enter(mine[None, :, some], slots[some].view(1, 1, -1))[0]
    return Sample(
        framed, mine.float(), its.float(), chosen, at, slots, stream, inverse,
        every, later_inverse, skip, some, sampling,
    )  # fmt: skip
