"""A layer's profile from one prefill: its queries, keys and values are all the data needed.

What noise does, per KV head (metrics are averaged over its query heads, weights summed):

  values  o = sum_i a_i v_i, so noise n_i on v_i adds sum_i a_i^2 E|W_O n_i|^2 to the output:
          metric W_O^T W_O, weight sum_i a_i^2. What is not coded at all is missing from all values
          alike and adds up: it costs what it contributes to o, E|W_O sum_i a_i (v_i - mean)|^2
  keys    noise e on a logit moves the output by a_i e |W_O (v_i - o)|: metric E[q q^T] with the
          queries rotated into the keys' frame, weight sum_i a_i^2 |W_O (v_i - o)|^2

both relative to the squared norm of the residual stream that the output is added to, where W_O is
as the norms of the layer read that stream (`residual.OutputSide.as_read`). Queries ask
where they attend, but later ones will attend elsewhere: the key metric is partly weighted by
influence and otherwise uniform over all pairs. That part needs many queries and is cheap; following
a query to the output is not, so few are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.moments import Moments
from nexusquant.profile import SIDES, LayerProfile
from nexusquant.rank_costs import RankCosts, rank_costs
from nexusquant.residual import OutputSide
from nexusquant.sampling import PREFILL, Sample, Sampling, sample_of

MIN_TOKENS = 448
"""Tokens that a profile needs at least (docs/results: KL against the length it was built from). A
little under 512, so that layers with a window of 512 get one."""

MIN_DISTINCT = 16
"""Different tokens that a text needs at least: of few, too few directions can be known."""


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's profile is computed from; of several texts, the average of each."""

    key: Moments
    value: Moments
    inverse_residual: Tensor
    rank_costs: RankCosts | None = None

    @staticmethod
    def mean(parts: list[LayerStatistics]) -> LayerStatistics:
        """The average over texts, each counting the same."""
        key, value = (Moments.average([getattr(part, side) for part in parts]) for side in SIDES)
        inverse = torch.stack([part.inverse_residual for part in parts]).mean(0)
        ranked = [part.rank_costs for part in parts if part.rank_costs is not None]
        costs = [torch.stack(side).mean(0) for side in zip(*ranked, strict=True)]
        return LayerStatistics(key, value, inverse, (costs[0], costs[1]) if costs else None)

    def profile(self) -> LayerProfile:
        """The transforms. Kept on the CPU: devices get their copies when they need them."""
        with torch.inference_mode(False):  # made in inference mode, they could not be used outside
            key, value = self.key.to("cpu").side(), self.value.to("cpu").side()
            ranked = [x.to("cpu", copy=True) for x in self.rank_costs or ()]
        costs = (ranked[0], ranked[1]) if ranked else None
        return LayerProfile(key, value, float(self.inverse_residual), costs)


def varied(values: Tensor) -> bool:
    """Whether values (heads, n, dim) have `MIN_DISTINCT` different vectors.

    In the first layer, they differ only where tokens do.
    """
    return len(values.float().sum((0, 2)).bfloat16().unique()) >= MIN_DISTINCT


@torch.no_grad()
def layer_statistics(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    *,
    start: int,
    valid: Tensor | None,
    frame: KeyFrame,
    sinks: int,
    scaling: float,
    softcap: float | None,
    output: OutputSide,
    sampling: Sampling = PREFILL,
) -> LayerStatistics:
    """Statistics of one layer from the longest row of a chunk.

    Args:
        keys, values: (batch, kv_heads, tokens, dim), keys post-RoPE.
        queries: (batch, query_heads, q_len, dim) post-RoPE, of the last q_len tokens.
        start: slot of the first token.
        valid: (batch, tokens) bool, False for padding.
        sinks: leading tokens that are stored exactly: outliers that would spoil the statistics.
    """
    row = 0 if valid is None else int(valid.sum(-1).argmax())
    frame = frame.of_row(row)
    sample = sample_of(keys, values, queries, row, start, valid, frame, sinks, output, sampling)
    kv_heads, dim = sample.keys.shape[0], sample.values.shape[-1]
    projection, added = output.as_read(sample.stream)
    if projection is None:
        gram = torch.eye(dim, device=keys.device).expand(kv_heads, dim, dim)
    else:
        weight = projection.to(keys.device).unflatten(-1, (-1, dim)).transpose(0, 1)
        gram = (weight.mT @ weight).unflatten(0, (kv_heads, -1)).mean(1)  # of a group's query heads
    root = _root(gram)
    attention = _influence(sample, root, scaling, softcap)
    key_metric = _key_metric(sample, attention.share, frame) * scaling**2
    plain = output.complete and added is None
    unit = 1.0 if plain else attention.energy.clamp(min=1e-12) / (added or 1.0)
    some, attended = sample.some, sampling.attended
    costs = rank_costs(
        sample.keys, sample.values, sample.every_query, root, sample.later_inverse_residual,
        last_slot=int(sample.slots[-1]), frame=frame, sinks=sample.skip, scaling=scaling,
        softcap=softcap,
    )  # fmt: skip
    return LayerStatistics(
        Moments.of(
            sample.framed, key_metric, attention.key_weight / unit,
            attention.share.sum((1, 2))[:, some], attended,
        ),
        Moments.of(
            sample.values[:, some], gram, attention.value_weight.sum(-1) / unit,
            attention.value_weight[:, some], attended, attention.added / unit,
        ),
        sample.inverse_residual.mean() / unit,
        costs and (costs[0] / unit, costs[1] / unit),
    )  # fmt: skip


@dataclass(frozen=True)
class _Influence:
    share: Tensor  # (kv_heads, group, asked, n): of a pair in all influence; sums to 1 per head
    key_weight: Tensor  # (kv_heads,)
    value_weight: Tensor  # (kv_heads, n)
    energy: Tensor  # (), squared norm of the attention output
    added: Tensor  # (kv_heads, value_dim, value_dim), second moment of what coded values add to it


def _root(gram: Tensor) -> Tensor:
    """R with R R^T = gram (heads, dim, dim), or next to it where that is singular."""
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    eye = torch.eye(gram.shape[-1], device=gram.device)
    root: Tensor = torch.linalg.cholesky_ex(gram + ridge * eye).L
    return root


def _influence(sample: Sample, root: Tensor, scaling: float, softcap: float | None) -> _Influence:
    """What noise on every key and value would do to the output of the queries asked."""
    kv_heads, tokens, _ = sample.keys.shape
    asked = slice(None, None, sample.sampling.asked)
    hidden = torch.arange(tokens, device=root.device) > sample.query_at[asked, None]
    queries = sample.queries[:, asked].unflatten(0, (kv_heads, -1)) * scaling
    inverse = sample.inverse_residual[asked, None]
    shares, key_weight, value_weight, energy, added = [], [], [], [], []
    for head in range(kv_heads):
        logits = queries[head] @ sample.keys[head].mT  # (group, asked, n)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weight = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        values = sample.values[head] @ root[head]
        mean = weight @ values
        distance = (mean @ values.mT).mul_(-2).add_(values.square().sum(-1))
        size = mean.square().sum(-1, keepdim=True)
        energy.append(size.mean(1).sum())
        distance.add_(size).clamp_(min=0)
        weight[..., : sample.skip] = 0
        coded = sample.values[head] - sample.values[head, sample.skip :].mean(0)
        sums = (weight @ coded * inverse.sqrt()).flatten(0, 1)
        added.append(sums.mT @ sums / weight.shape[1])
        square = weight.square_().mul_(inverse)
        value_weight.append(square.mean(1).sum(0))
        influence = square.mul_(distance)
        total = influence.sum()
        key_weight.append(total / influence.shape[1])
        shares.append(influence / total.clamp(min=1e-30))
    return _Influence(
        torch.stack(shares), torch.stack(key_weight), torch.stack(value_weight),
        torch.stack(energy).sum(), torch.stack(added),
    )  # fmt: skip


def _key_metric(sample: Sample, influence: Tensor, frame: KeyFrame) -> Tensor:
    """E[q q^T] over pairs, queries rotated into the frame of the key: (kv_heads, dim, dim).

    influence: (kv_heads, group, asked, n), the share of each pair whose query is asked.
    """
    (kv_heads, group, _, tokens), dim = influence.shape, sample.keys.shape[-1]
    queries = sample.queries.unflatten(0, (kv_heads, -1))  # (kv_heads, group, sampled, dim)
    sampling = sample.sampling
    size = max(frame.page, 16) if frame.rotates else tokens
    stride = size * max(1, tokens // size // sampling.pages)
    starts = torch.arange(0, tokens, stride, device=influence.device)
    at = starts[:, None] + torch.arange(size, device=influence.device)  # (pages, size)
    inside = (at >= sample.skip) & (at < tokens)
    asked = (influence[..., at.clamp(max=tokens - 1)] * inside).sum(-1)
    seen = ((at <= sample.query_at[:, None, None]) & inside).sum(-1)  # (sampled, pages)
    visible = (sample.query_at + 1 - sample.skip).clamp(min=1)[:, None]
    uniform = seen / visible * ((1 - sampling.influence) / len(seen) / group)
    share = uniform.expand(kv_heads, group, -1, -1).clone()
    share[:, :, :: sampling.asked] += asked * sampling.influence
    share, flat = share.flatten(1, 2), queries.flatten(1, 2)  # (kv_heads, group x sampled, ...)
    weighted = (share[..., None] * flat[:, :, None]).flatten(2)  # of all pages side by side
    moments = (flat.mT @ weighted).unflatten(-1, (-1, dim)).transpose(1, 2)  # a page's dim x dim
    if frame.rotates:
        basis = torch.eye(dim, device=moments.device).repeat(len(starts), 1)[None, None]
        anchors = sample.slots[starts].repeat_interleave(dim).view(1, 1, -1)
        turn = frame.adjoint(basis, anchors).view(len(starts), dim, dim)  # of vectors in rows
        moments = turn.mT @ moments @ turn
    metric = moments.sum(1) / share.sum((1, 2))[:, None, None].clamp(min=1e-30)
    return (metric + metric.mT) / 2
