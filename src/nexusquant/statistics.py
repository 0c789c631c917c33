"""A layer's profile from one prefill: its queries, keys and values are all the data needed.

What noise does, per KV head (metrics are averaged over its query heads, weights summed):

  values  o = sum_i a_i v_i, so noise n_i on v_i adds sum_i a_i^2 E|W_O n_i|^2 to the output:
          metric W_O^T W_O, weight sum_i a_i^2
  keys    noise e on a logit moves the output by a_i e |W_O (v_i - o)|: metric E[q q^T] with the
          queries rotated into the keys' frame, weight sum_i a_i^2 |W_O (v_i - o)|^2

both relative to the squared norm of the residual stream that the output is added to. Queries ask
where they attend, but later ones will attend elsewhere: the key metric is a quarter weighted by
influence and otherwise uniform over all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexusquant.math.e8 import GROUP
from nexusquant.math.klt import weighted_klt
from nexusquant.math.rope import KeyFrame
from nexusquant.profile import LayerProfile, Side

MIN_TOKENS = 448
"""Tokens that a profile needs at least (docs/results: KL against the length it was built from). A
little under 512, so that layers with a window of 512 get one."""

_QUERIES = 64  # sampled per KV head, at least a quarter of them per query head
_PAGES = 16  # pages of keys, evenly spaced, that the key metric looks at
_INFLUENCE = 0.25  # share of influence in the key metric


@dataclass(frozen=True)
class OutputSide:
    """What a layer's attention output goes through and into.

    Attributes:
        projection: (hidden, query_heads x value_dim) weight of the output projection, None if it
            cannot be read.
        residual: (batch, tokens, hidden) residual stream of the chunk, None if unknown.
    """

    projection: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """One row's chunk without padding."""

    keys: Tensor  # (kv_heads, n, dim) fp32, in the frame
    post_rope: Tensor  # the same, as rotated by the model
    values: Tensor  # (kv_heads, n, value_dim)
    queries: Tensor  # (query_heads, sampled, dim), post-RoPE
    query_at: Tensor  # (sampled,) indices into the keys
    slots: Tensor  # (n,)
    inverse_residual: Tensor  # (sampled,)
    skip: int  # leading keys that are stored exactly


@dataclass(frozen=True)
class _Moments:
    """First and second moments of one side: mean (heads, dim), covariance and metric (h, d, d)."""

    mean: Tensor
    covariance: Tensor
    metric: Tensor
    weight: Tensor

    def side(self) -> Side:
        """Transform, variances, and the scaling of every group to unit variance."""
        transform, inverse, spectrum = weighted_klt(self.covariance, self.metric)
        variance = spectrum.unflatten(-1, (-1, GROUP)).mean(-1)
        floor = variance.amax(-1, keepdim=True).clamp(min=1e-20) * 1e-9
        deviation = variance.clamp(min=floor).sqrt().repeat_interleave(GROUP, -1)
        return Side(
            transform / deviation[..., None], inverse * deviation[..., None, :], self.mean,
            variance, self.weight,
        )  # fmt: skip


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's profile is computed from; of several texts, the average of each."""

    key: _Moments
    value: _Moments
    inverse_residual: Tensor

    @staticmethod
    def mean(parts: list[LayerStatistics]) -> LayerStatistics:
        """The average over texts, each counting the same."""

        def average(side: str) -> _Moments:
            fields = zip(*(vars(getattr(part, side)).values() for part in parts), strict=True)
            return _Moments(*(torch.stack(column).mean(0) for column in fields))

        inverse = torch.stack([part.inverse_residual for part in parts]).mean(0)
        return LayerStatistics(average("key"), average("value"), inverse)

    def profile(self) -> LayerProfile:
        """The transforms. Kept on the CPU: devices get their copies when they need them."""
        sides = (self.key.side().to("cpu"), self.value.side().to("cpu"))
        return LayerProfile(*sides, float(self.inverse_residual))


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
    sample = _sample(keys, values, queries, row, start, valid, frame, sinks, output)
    kv_heads, dim = sample.keys.shape[0], sample.values.shape[-1]
    projection = output.projection
    if projection is None:
        gram = torch.eye(dim, device=keys.device).expand(kv_heads, dim, dim)
    else:
        weight = projection.detach().to(keys.device).float().unflatten(-1, (kv_heads, -1, dim))
        weight = weight.permute(1, 0, 2, 3)  # (kv_heads, hidden, group, dim)
        stacked = weight.flatten(1, 2)
        gram = stacked.mT @ stacked / weight.shape[2]
    attention = _influence(sample, gram, scaling, softcap)
    key_metric = _key_metric(sample, attention.per_key, frame) * scaling**2
    body = slice(sample.skip, None)
    return LayerStatistics(
        _moments(sample.keys[:, body], key_metric, attention.key_weight),
        _moments(sample.values[:, body].float(), gram, attention.value_weight),
        sample.inverse_residual.mean(),
    )


def _sample(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    row: int,
    start: int,
    valid: Tensor | None,
    frame: KeyFrame,
    sinks: int,
    output: OutputSide,
) -> Sample:
    """The row's real tokens and some of its queries, evenly spaced over the last three quarters."""
    tokens, q_len = keys.shape[2], queries.shape[2]
    everything = torch.arange(tokens, device=keys.device)
    real = everything if valid is None else everything[valid[row]]
    slots = real + start
    first = max(len(real) // 4, int((real < tokens - q_len).sum()))
    group = queries.shape[1] // keys.shape[1]
    count = min(max(_QUERIES // group, _QUERIES // 4), len(real) - first)
    at = torch.linspace(first, len(real) - 1, count, device=keys.device).round().long()
    chosen = queries[row][:, real[at] - (tokens - q_len)].float()
    if output.residual is None:
        inverse = torch.ones(count, device=keys.device)
    else:
        stream = output.residual[row, real[at] - tokens].float()
        inverse = 1 / stream.square().sum(-1).clamp(min=1e-12)
    one = slice(row, row + 1)
    post_rope = keys[one][:, :, real]
    return Sample(
        frame.enter(post_rope, slots.view(1, 1, -1))[0], post_rope[0].float(),
        values[row][:, real], chosen, at, slots, inverse, sinks if start == 0 else 0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Influence:
    per_key: Tensor  # (kv_heads, group x sampled, n): share of a pair in the key metric
    key_weight: Tensor  # (kv_heads,)
    value_weight: Tensor


def _influence(sample: Sample, gram: Tensor, scaling: float, softcap: float | None) -> _Influence:
    """Weights of the two sides, and of every pair of query and key, one KV head at a time."""
    kv_heads, tokens, _ = sample.keys.shape
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    eye = torch.eye(gram.shape[-1], device=gram.device)
    root = torch.linalg.cholesky_ex(gram + ridge * eye).L
    hidden = torch.arange(tokens, device=gram.device) > sample.query_at[:, None]
    seen = (~hidden).float()
    seen[:, : sample.skip] = 0
    uniform = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    per_key, key_weight, value_weight = [], [], []
    for head in range(kv_heads):
        group = sample.queries.unflatten(0, (kv_heads, -1))[head]  # (group, sampled, dim)
        logits = (group * scaling) @ sample.post_rope[head].mT
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weight = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        values = sample.values[head].float() @ root[head]
        mean = weight @ values
        distance = (
            values.square().sum(-1) + mean.square().sum(-1, keepdim=True) - 2 * mean @ values.mT
        ).clamp_(min=0)
        square = weight.square_() * sample.inverse_residual[:, None]
        square[..., : sample.skip] = 0
        value_weight.append(square.sum(-1).mean(1).sum())
        influence = square * distance
        key_weight.append(influence.sum(-1).mean(1).sum())
        share = influence / influence.sum().clamp(min=1e-30) * _INFLUENCE
        share += uniform * ((1 - _INFLUENCE) / len(group) / len(sample.query_at))
        per_key.append(share.flatten(0, 1))
    return _Influence(torch.stack(per_key), torch.stack(key_weight), torch.stack(value_weight))


def _key_metric(sample: Sample, per_key: Tensor, frame: KeyFrame) -> Tensor:
    """E[q q^T] over pairs, queries rotated into the frame of the key: (kv_heads, dim, dim)."""
    kv_heads, dim = per_key.shape[0], sample.keys.shape[-1]
    queries = sample.queries.unflatten(0, (kv_heads, -1)).flatten(1, 2)
    size = max(frame.page, 16) if frame.rotates else per_key.shape[-1]
    stride = max(1, per_key.shape[-1] // size // _PAGES)
    blocks = nn.functional.pad(per_key, (0, -per_key.shape[-1] % size)).unflatten(-1, (-1, size))
    share = blocks[..., ::stride, :].sum(-1).mT  # (kv_heads, blocks, queries)
    weighted = share[..., None] * queries[:, None]
    moments = weighted.mT @ queries[:, None]  # (heads, blocks, dim, dim)
    if frame.rotates:
        anchors = sample.slots[:: size * stride][: share.shape[1]]
        flat = moments.reshape(1, kv_heads, -1, dim)
        slots = anchors.repeat_interleave(dim).view(1, 1, -1)
        turned = frame.adjoint(flat, slots).view_as(moments).mT.reshape_as(flat)
        moments = frame.adjoint(turned, slots).view_as(moments)
    metric = moments.sum(1) / share.sum((1, 2))[:, None, None].clamp(min=1e-30)
    return (metric + metric.mT) / 2


def _moments(x: Tensor, metric: Tensor, weight: Tensor) -> _Moments:
    """x (kv_heads, n, dim) fp32."""
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    return _Moments(mean[:, 0], centred.mT @ centred / x.shape[1], metric, weight)
