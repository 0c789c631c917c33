"""A bound on stored tokens while decoding: the least attended leave, in every tier alike.

Stored tokens are scored by the attention that recent queries pay them, on their codes (the window
of SnapKV, Li et al. 2024, arXiv 2404.14469, moving along with the generation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexusquant.compressor import Stored
from nexusquant.math.rope import KeyFrame
from nexusquant.tokens import CodedTokens, ExactTokens

WINDOW = 32
"""Queries that vote."""


def retain(
    stored: Stored,
    limit: int,
    queries: Tensor,
    *,
    frame: KeyFrame,
    scaling: float,
    softcap: float | None,
    recent_from: int,
) -> Stored:
    """`stored` with at most `limit` tokens per head, the sinks included.

    Args:
        queries: (batch, query_heads, q_len, dim) post-RoPE, behind all stored tokens.
        recent_from: slots from here on stay.

    The tokens that go are those with the least mean attention in their tier; every tier shrinks by
    the same factor, so the mean rate stays.
    """
    sinks = 0 if stored.sinks is None else stored.sinks.slots.count
    total = stored.count - sinks
    allowed = max(limit - sinks, 0)
    if total <= allowed:
        return stored
    scores = attention_received(stored, queries[:, :, -WINDOW:], frame, scaling, softcap)
    body, left, spare = [], total, allowed
    parts: list[CodedTokens | ExactTokens] = list(stored.body)
    for part, score in zip(parts, scores, strict=True):
        count = part.slots.count
        keep = round(count * spare / left) if left else 0
        left, spare = left - count, spare - keep
        if count > keep:
            at = part.slots.positions(part.device).expand(*score.shape[:2], -1)
            priority = score.masked_fill(at >= recent_from, torch.inf)
            priority = priority.masked_fill(at < 0, -torch.inf)
            best = priority.argsort(dim=-1, descending=True, stable=True)[..., :keep]
            part = part.pick(best.sort(dim=-1).values)
        body.append(part)
    return stored.with_body(body)


def attention_received(
    stored: Stored, queries: Tensor, frame: KeyFrame, scaling: float, softcap: float | None
) -> list[Tensor]:
    """Mean attention weight of every stored token, (batch, kv_heads, n) per part of the body."""
    logits = []
    for part in (*([stored.sinks] if stored.sinks else []), *stored.body):
        at = part.slots.positions(part.device)
        coded = isinstance(part, CodedTokens)
        keys = frame.leave(part.keys(), at) if coded else part.keys.float()
        grouped = queries.float().unflatten(1, (part.kv_heads, -1)).flatten(2, 3) * scaling
        logit = grouped @ keys.mT
        if softcap is not None:
            logit = torch.tanh(logit / softcap) * softcap
        hidden = (at < 0)[:, :, None]
        logits.append(logit.masked_fill(hidden, torch.finfo(torch.float32).min))
    weights = torch.cat(logits, -1).softmax(-1).mean(2)
    pieces = list(weights.split([x.shape[-1] for x in logits], -1))
    return pieces[len(pieces) - len(stored.body) :]
