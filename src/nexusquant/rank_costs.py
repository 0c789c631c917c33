"""What noise on a token does to what comes later, by the rank of its score: where bits should go.

A score only orders the tokens of one head. How much a head attends to tokens far back at all, and
how far its later attention follows the order, differs by orders of magnitude between heads and is
the model's: heads that copy find one token in a thousand, any token; others never look back. So it
is measured: the tokens of the first three quarters of a text are scored as if it ended there, the
queries of the last quarter tell what noise on each of them would have done. Tokens just written are
another matter: heads that look next to themselves, and nowhere else, need those.

Damage per unit of noise, of one later query and summed over those of a KV head's group
(`nexusquant.statistics` derives it): a^2 for a value, a^2 |W_O (v - o)|^2 for a key, both over the
squared norm of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexusquant.frame import KeyFrame, QueryRope
from nexusquant.scorers import ScoreInputs, get_scorer

SCORER = "expected_and_observed"
"""Whose ranks they are."""

RANKS = 40
"""Classes of equal size, from the highest score to the lowest."""

_LATER = 128  # queries, evenly spaced

RECENT = (8, 128)
"""Distances from which a token is read as a fresh one: it is coded, but little follows it."""

RankCosts = tuple[Tensor, Tensor]
"""Of keys and of values, (kv_heads, RANKS + 1) fp32 each; the last column is of recent tokens."""


def later_queries(tokens: int) -> tuple[int, Tensor]:
    """Tokens in front, and where the queries are that look back at them, in a text of `tokens`."""
    front = tokens - tokens // 4
    count = min(_LATER, tokens - front)
    return front, torch.linspace(front, tokens - 1, count).round().long()


@torch.no_grad()
def rank_costs(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    root: Tensor,
    inverse_residual: Tensor,
    *,
    last_slot: int,
    frame: KeyFrame,
    sinks: int,
    scaling: float,
    softcap: float | None,
) -> RankCosts | None:
    """Costs by rank in one text; None if it is too short to tell.

    Args:
        keys, values: (kv_heads, n, dim) fp32, keys post-RoPE.
        queries: (query_heads, m, dim) post-RoPE, of the last m tokens.
        root: (kv_heads, value_dim, r), |v root| is the norm of a value's share of the output.
        inverse_residual: (later queries,) 1 / squared norm of the residual stream.
        last_slot: of the last token.
        sinks: leading tokens that are stored exactly.
    """
    tokens, held = keys.shape[1], keys.shape[1] - queries.shape[1]
    front, later = later_queries(tokens)
    if front - sinks < 2 or front <= held or not len(later):
        return None
    rope = QueryRope.of(frame, last_slot - (tokens - front), keys.shape[-1])
    scores = get_scorer(SCORER).score(
        ScoreInputs(
            queries[None, :, : front - held], keys[None, :, :front], values[None, :, :front], None,
            scaling, softcap, sinks, rope,
        )
    )[0]  # fmt: skip
    later = later.to(keys.device)
    asked = queries[:, later - held].float().unflatten(0, (len(keys), -1)) * scaling
    distance = later[:, None] - torch.arange(tokens, device=keys.device)
    hidden, recent = distance < 0, (distance >= RECENT[0]) & (distance < RECENT[1])
    recent[:, :sinks] = False
    costs: list[list[Tensor]] = [[], []]
    for head, of_group in enumerate(asked):
        logits = of_group @ keys[head].mT  # (group, later, n)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weight = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        read = values[head] @ root[head]
        mean = weight @ read
        square = weight.square_() * inverse_residual[:, None]
        apart = (mean @ read.mT).mul_(-2).add_(read.square().sum(-1))
        apart = apart.add_(mean.square().sum(-1, keepdim=True)).clamp_(min=0).mul_(square)
        order = scores[head, sinks:].argsort(descending=True, stable=True)
        for side, damage in zip(costs, (apart.sum(0), square.sum(0)), strict=True):  # (later, n)
            by_class = _by_class(damage[:, sinks:front].mean(0)[order])
            near = damage[recent].sum() / recent.sum().clamp(min=1)
            side.append(torch.cat([by_class, near[None]]))
    return torch.stack(costs[0]), torch.stack(costs[1])


def _by_class(ordered: Tensor) -> Tensor:
    """Means (RANKS,) of consecutive stretches of (n,)."""
    at = torch.linspace(0, len(ordered), RANKS + 1, dtype=torch.float64, device=ordered.device)
    below = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)]).double()
    whole = at.floor().long().clamp(max=len(ordered) - 1)
    edges = below[whole] + (at - whole) * ordered[whole].double()
    return (edges.diff() * RANKS / len(ordered)).clamp(min=0).float()
