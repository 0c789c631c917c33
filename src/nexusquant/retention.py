"""A bound on stored tokens while decoding: the least attended leave, in every tier alike.

Stored tokens are scored by the attention that recent queries pay them, on their codes (the window
of SnapKV, Li et al. 2024, arXiv 2404.14469, moving along with the generation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.kernels.base import spread
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, Part

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
    """`stored` with at most `limit` tokens per head (their mean), the sinks included.

    Args:
        queries: (batch, query_heads, q_len, dim) post-RoPE, behind all stored tokens.
        recent_from: slots from here on stay, as do fresh tokens, also where that takes more than
            `limit`: a part has the same number of entries in every head, whichever parts their
            recent tokens are in.

    The tokens that go are those with the least mean attention in their part; apart from recent
    tokens every part shrinks by the same factor, so the mean rate stays, and so do the shares of
    the heads.
    """
    if stored.count <= limit or not stored.body:
        return stored
    fixed = [part.slots.count for part in (stored.sinks, stored.fresh) if part is not None]
    scores = attention_received(stored, queries[:, :, -WINDOW:], frame, scaling, softcap)
    parts: list[Part] = list(stored.body)
    quotas = _quotas(parts, max(limit - sum(fixed), 0) * stored.kv_heads, recent_from)
    body = []
    for part, score, keep in zip(parts, scores, quotas, strict=True):
        if part.slots.count > keep:
            at = part.slots.positions(part.device).expand(*score.shape[:2], -1)
            priority = score.masked_fill(at >= recent_from, torch.inf)
            priority = priority.masked_fill(at < 0, -torch.inf)
            best = priority.argsort(dim=-1, descending=True, stable=True)[..., :keep]
            part = part.pick(best.sort(dim=-1).values)
        body.append(part)
    return stored.with_body(body)


def _quotas(parts: Sequence[Part], room: int, recent_from: int) -> list[int]:
    """How many entries per head each part keeps, `room` over all heads: recent ones, then others.

    The recent entries of a part are as many as the fullest head and row have there.
    """
    sure = []
    for part in parts:
        recent = part.slots.positions(part.device) >= max(recent_from, 0)
        sure.append(int(recent.sum(-1).max()))
        room -= sure[-1] * part.kv_heads
    room = max(room, 0)
    free = [part.slots.count - fixed for part, fixed in zip(parts, sure, strict=True)]
    left = sum(count * part.kv_heads for part, count in zip(parts, free, strict=True))
    quotas = []
    for part, count, fixed in zip(parts, free, sure, strict=True):
        keep = min(round(count * room / left), room // part.kv_heads) if left else 0
        left, room = left - count * part.kv_heads, room - keep * part.kv_heads
        quotas.append(fixed + keep)
    return quotas


def attention_received(
    stored: Stored, queries: Tensor, frame: KeyFrame, scaling: float, softcap: float | None
) -> list[Tensor]:
    """Mean attention weight of every stored token, (batch, heads of the part, n) per body part."""
    logits, kv_heads = [], stored.kv_heads
    everyone = queries.float().unflatten(1, (kv_heads, -1)).flatten(2, 3) * scaling
    before = [stored.sinks] if stored.sinks else []
    parts = [*before, *stored.body, *([stored.fresh] if stored.fresh else [])]
    for part in parts:
        at = part.slots.positions(part.device)
        coded = isinstance(part, CodedTokens)
        keys = frame.leave(part.keys(), at) if coded else part.keys.float()
        logit = (everyone if part.heads is None else everyone[:, list(part.heads)]) @ keys.mT
        if softcap is not None:
            logit = torch.tanh(logit / softcap) * softcap
        hidden, least = (at < 0)[:, :, None], torch.finfo(torch.float32).min
        logits.append(spread(logit.masked_fill(hidden, least), part.heads, kv_heads, least))
    weights = torch.cat(logits, -1).softmax(-1).mean(2)
    pieces = zip(parts, weights.split([x.shape[-1] for x in logits], -1), strict=True)
    own = [x if part.heads is None else x[:, list(part.heads)] for part, x in pieces]
    return own[len(before) : len(before) + len(stored.body)]
