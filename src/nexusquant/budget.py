"""How many tokens are kept, and which: sinks, recent window, then the highest scores.

Heads may share their budget: AdaKV (Feng et al. 2024, arXiv 2407.11550) keeps the highest scores of
a layer, whichever head they are in, and its safeguard leaves every head a part of an even budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nexusquant.errors import ConfigError

_LEAST_PART = 8  # entries of some heads that are worth a part of their own


class Selection(NamedTuple):
    """Candidate indices to store, int64, ascending; rows with fewer end in -1.

    sinks: `(batch, s)`, kept exact for all heads.
    kept: `(batch, heads, n)`, everything else that stays; heads is 1 if all heads agree. Their
        numbers differ between heads only with a `head_safeguard` below 1.
    """

    sinks: Tensor
    kept: Tensor


def select_tokens(
    scores: Tensor | None,
    *,
    batch: int,
    kv_heads: int,
    tokens: int,
    valid: Tensor | None,
    evict_ratio: float,
    sinks: int,
    recent: int,
    per_head: bool,
    device: torch.device | str,
    head_safeguard: float = 1.0,
) -> Selection:
    """Choose which of `tokens` candidates stay in the cache.

    A row with n valid tokens keeps `max(round((1 - evict_ratio) n), min(n, sinks + recent))` of
    them: its first `sinks` and last `recent` valid tokens whatever their score, the rest by score.
    Sinks count towards that total but are returned apart. Padding is never kept. Ties go to the
    earlier token. For a later chunk of the same sequence pass `sinks=0`.

    scores: `(batch, kv_heads, tokens)` on `device`, finite where valid, higher is kept; None only
        if nothing is evicted.
    valid: `(batch, tokens)` bool, False is padding; None if there is none.
    per_head: each KV head keeps its own tokens. Otherwise all keep those with the highest plain
        mean over heads; a scorer whose scale differs between heads thereby weights them.
    head_safeguard: in (0, 1]; below 1 heads keep different numbers, whose mean is as above. A
        head is sure of its best tokens up to that share of the mean, and of its recent ones. The
        others are the best of all heads together; ties go to the earlier token, then to the lower
        head. No effect without `per_head`.

    Raises ConfigError for an argument outside its range and for a `valid` of the wrong shape.
    """
    if not 0.0 <= evict_ratio < 1.0 or sinks < 0 or recent < 0:
        raise ConfigError(
            f"evict_ratio must be in [0, 1), sinks and recent at least 0; "
            f"got {evict_ratio}, {sinks}, {recent}"
        )
    if not 0.0 < head_safeguard <= 1.0:
        raise ConfigError(f"head_safeguard must be in (0, 1], got {head_safeguard}")
    if valid is None:
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    elif valid.shape != (batch, tokens) or valid.dtype != torch.bool:
        raise ConfigError(
            f"valid must be bool {(batch, tokens)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    else:
        mask = valid.to(device)
    rank = mask.cumsum(-1)  # 1 at a row's first valid token
    n_valid = rank[:, -1:] if tokens else rank.new_zeros(batch, 1)
    is_sink = mask & (rank <= sinks)
    rest = (mask & ~is_sink)[:, None]
    sink_indices = _pack(is_sink)

    if evict_ratio == 0.0:
        return Selection(sink_indices, _pack(rest))
    if scores is None:
        raise ConfigError(f"evict_ratio {evict_ratio} needs scores, got None")

    # Counted on the CPU: n * ratio wants float64, which not every device has.
    n = n_valid.cpu()
    total = torch.round((1.0 - evict_ratio) * n.double()).long()
    total = torch.maximum(total, n.clamp(max=sinks + recent))
    n_kept = total - n.clamp(max=sinks)

    if not per_head:
        scores = scores.mean(1, keepdim=True)
    is_recent = rest & (rank > n_valid - recent)[:, None]
    priority = scores.masked_fill(~rest, -torch.inf).masked_fill(is_recent, torch.inf)
    if head_safeguard == 1.0 or not per_head:
        return Selection(sink_indices, _pack(_highest(priority, n_kept)))
    sure = _highest(priority, (n_kept.double() * head_safeguard).round().long())
    pool = priority.masked_fill(sure, torch.inf).mT.flatten(1)  # token after token
    chosen = _highest(pool[:, None], n_kept * kv_heads).view(batch, tokens, kv_heads).mT
    return Selection(sink_indices, _pack(chosen))


def _highest(priority: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` (batch, 1; on the CPU) highest along the last axis of `priority`."""
    width = int(count.max()) if len(count) else 0
    # A stable sort, where topk would break ties differently on every device.
    best = priority.argsort(dim=-1, descending=True, stable=True)[..., :width]
    wanted = (torch.arange(width) < count)[:, None].to(priority.device)
    chosen = torch.zeros_like(priority, dtype=torch.bool)
    return chosen.scatter_(-1, best, wanted.expand(best.shape))


def split_tiers(scores: Tensor, kept: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Entries of `kept` by importance: the first share of them with the best scores, and so on.

    Args:
        scores: (batch, kv_heads, tokens).
        kept: (batch, heads or 1, n) indices, -1 where empty; one head means the mean score.
        shares: fraction of each tier, adding up to 1.

    Returns:
        Per tier (batch, heads or 1, n_tier) indices into the n entries, ascending; rows with fewer
        end in -1.
    """
    if kept.shape[1] == 1:
        scores = scores.mean(1, keepdim=True)
    empty = kept < 0
    own = scores.float().gather(-1, kept.clamp(min=0)).masked_fill(empty, -torch.inf)
    order = own.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    filled = (~empty).sum(-1, keepdim=True)
    bounds = [(filled * min(sum(shares[: i + 1]), 1.0)).round() for i in range(len(shares) - 1)]
    tier = sum((rank >= bound).long() for bound in bounds) if bounds else torch.zeros_like(rank)
    assert isinstance(tier, Tensor)
    return [_pack((tier == i) & ~empty) for i in range(len(shares))]


def split_heads(entries: Tensor) -> list[tuple[tuple[int, ...] | None, Tensor]]:
    """Entries of uneven heads as parts in which all heads have the same number.

    Args:
        entries: (batch, heads or 1, n) indices, ascending, -1 behind a row's last one.

    Returns:
        Per part its heads, None for all, and their entries (batch, heads of the part, m), likewise.
        The first part holds the first entries of all heads, as many as the head with the fewest
        has; the others go on with the heads that have more. A head has as many as its fullest batch
        row. A part of less than `_LEAST_PART` entries, all its heads together, is not worth having:
        the part before it takes them, padded with -1 for the heads that have no more.
    """
    counts = (entries >= 0).sum(-1).amax(0).tolist()
    ends: list[int] = []
    for end in sorted(set(counts), reverse=True):
        more = sum(count > end for count in counts)
        if not ends or (ends[0] - end) * more >= _LEAST_PART:
            ends.insert(0, end)
    parts: list[tuple[tuple[int, ...] | None, Tensor]] = [(None, entries[..., : ends[0]])]
    for begin, end in pairwise(ends):
        heads = tuple(head for head, count in enumerate(counts) if count > begin)
        parts.append((heads, entries[:, list(heads), begin:end]))
    return parts


def _pack(mask: Tensor) -> Tensor:
    """Indices of the True entries along the last axis, ascending, -1 after each row's last one.

    `(..., tokens)` bool to `(..., n)` int64, with n the largest number of True entries in a row.
    """
    slot = mask.cumsum(-1)
    width = int(slot[..., -1].max()) if slot.numel() else 0
    # Column 0 takes the False entries and is cut off again.
    packed = torch.full((*mask.shape[:-1], width + 1), -1, dtype=torch.int64, device=mask.device)
    index = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    packed.scatter_(-1, torch.where(mask, slot, 0), index)
    return packed[..., 1:].contiguous()
