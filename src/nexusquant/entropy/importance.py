"""Which tokens deserve finer steps: those that queries will look at.

Noise on a token matters as its attention weight squared, so with all tokens' noise d_i and bits
-log2(d_i) / 2 the best steps fall as 1 / weight (reverse water-filling; Cover & Thomas, Elements of
Information Theory, 10.3.3). Future weights are only expected ones (Devoto et al. 2025, arXiv
2510.00636, as in `nexusquant.scorers.expected_attention`, but with queries as the profile knows
them, so that keys and values are all it takes), hence the smaller power here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexusquant.entropy.profile import OCTAVE, QueryMoments

POWER = 0.65
"""Steps are as weight ** -POWER. docs/results says what others gave."""
FLOOR = 0.4
"""Weight that every token has on top, in mean weights: nobody knows what will be asked."""
UNIT = OCTAVE // 2
"""Steps of tokens differ by multiples of this."""
FINER, COARSER = -4, 8
"""Most, in units."""


def extra_steps(
    keys: Tensor, values: Tensor, queries: QueryMoments, turn: Tensor | None, scaling: float
) -> Tensor:
    """What is added to every token's step number, (tokens,) int16 multiples of `UNIT`.

    Args:
        keys: (kv_heads, tokens, dim), as rotated by the model, without sinks.
        values: (kv_heads, tokens, value_dim).
        queries: of the layer, without RoPE.
        turn: (dim, dim) mean rotation of the positions to come; None if queries have no RoPE.
        scaling: factor on the logits.
    """
    kv_heads, tokens, _ = keys.shape
    mean, covariance = queries.mean.float(), queries.covariance.float()
    if turn is not None:
        mean, covariance = mean @ turn.mT, turn @ covariance @ turn.mT
    group = len(mean) // kv_heads
    weight = torch.zeros(tokens)
    for head in range(kv_heads):
        k, size = keys[head].float(), values[head].float().norm(dim=-1)
        expected = torch.zeros(tokens)
        for q in range(head * group, (head + 1) * group):
            spread = ((k @ covariance[q]) * k).sum(-1)
            logits = scaling * (k @ mean[q]) + scaling**2 / 2 * spread
            expected += logits.softmax(0) * tokens / group
        score = (expected + FLOOR) * size
        weight += score / score.mean().clamp(min=1e-30)
    level = weight.nan_to_num(0).clamp(min=1e-9).log2()  # who encodes refuses NaN
    finer = POWER * (level - level.mean()) * (OCTAVE / UNIT)
    return (-finer).round().clamp(FINER, COARSER).to(torch.int16) * UNIT
