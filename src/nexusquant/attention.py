"""Attention over stored tokens and an exact tail, block by block, in plain PyTorch.

This is the reference: whole keys or values are never materialised, a block is decoded, used and
dropped. Parts are combined by their log-sum-exp (Dao et al. 2022, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.math.rope import KeyFrame
from nexusquant.tokens import CodedTokens, ExactTokens, count_heads, spread

_LOGITS = 1 << 22  # logits held at a time
_MASKED = float("-inf")


@dataclass(frozen=True)
class Mask:
    """Who may look at whom, in whatever form the model's attention function received it.

    Args:
        tensor: None (causal), (batch, columns) bool or int (padding), or (batch, heads or 1,
            q_len, columns) bool or additive float.
        query_slot: slot of the first query.
        first_column: slot (>= 0) that column 0 stands for; earlier slots are out of sight.
        window: sliding window in tokens, the query's own included; None for no window.
    """

    tensor: Tensor | None
    query_slot: int
    first_column: int = 0
    window: int | None = None

    def bias(self, slots: Tensor, q_len: int, kv_heads: int) -> Tensor:
        """What to do at `slots` (batch or 1, heads or 1, n; -1 = empty).

        Returns bool (True = visible) or additive float, broadcastable to (batch, kv_heads, group,
        q_len, n).
        """
        column = (slots - self.first_column)[:, :, None, None]  # negative where empty
        if self.tensor is None or self.tensor.ndim == 2:
            query = torch.arange(self.query_slot, self.query_slot + q_len, device=slots.device)
            query = query[:, None] - self.first_column
            seen = (column >= 0) & (column <= query)
            if self.window is not None:
                seen = seen & (column > query - self.window)
            if self.tensor is not None:
                seen = seen & self._columns(self.tensor[:, None, None, None].bool(), column, False)
            return seen
        mask = self.tensor
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
        hidden = False if mask.dtype == torch.bool else _MASKED
        return self._columns(mask, column, hidden)

    def of_heads(self, heads: tuple[int, ...], kv_heads: int) -> Mask:
        """For queries of some of the KV heads only."""
        mask = self.tensor
        if mask is None or mask.ndim == 2 or mask.shape[1] == 1:
            return self
        return replace(self, tensor=mask.unflatten(1, (kv_heads, -1))[:, list(heads)].flatten(1, 2))

    def _columns(self, mask: Tensor, column: Tensor, hidden: bool | float) -> Tensor:
        """mask (batch, h, g, q, columns) read at `column` (b, h, 1, 1, n), `hidden` outside."""
        width = mask.shape[-1]
        inside = (column >= 0) & (column < width)
        index = column.clamp(0, max(width - 1, 0))
        lead = torch.broadcast_shapes(mask.shape[:-1], index.shape[:-1])
        picked = mask.expand(*lead, width).gather(-1, index.expand(*lead, index.shape[-1]))
        return picked.masked_fill(~inside, hidden)


@dataclass(frozen=True)
class Partial:
    """Attention over some tokens: output (b, h, g, q, dv) and log-sum-exp (b, h, g, q, 1)."""

    output: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint sets of tokens."""
    lse = torch.stack([part.lse for part in parts])
    top = lse.amax(0)
    weight = torch.exp(lse - torch.where(top == _MASKED, 0.0, top))
    total = weight.sum(0)
    output = sum(w * part.output for w, part in zip(weight, parts, strict=True))
    assert isinstance(output, Tensor)
    return Partial(output / total.clamp(min=1e-38), top + total.clamp(min=1e-38).log())


def attend(
    query: Tensor,
    parts: Sequence[CodedTokens | ExactTokens],
    mask: Mask,
    *,
    frame: KeyFrame,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k + mask) v over all tokens of `parts`.

    Args:
        query: (batch, query_heads, q_len, dim), post-RoPE.
        parts: disjoint sets of tokens, one of them of all heads; coded keys are in `frame`.
        sink_logits: (query_heads,) learned extra logit without a value (gpt-oss `s_aux`).

    Returns:
        (batch, query_heads, q_len, value_dim) in the query's dtype; zero where nothing is visible.
    """
    kv_heads = count_heads(parts)
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scaling
    partials = [_attend_part(grouped, part, mask, frame, softcap) for part in parts]
    if sink_logits is not None:
        lse = sink_logits.float().view(1, kv_heads, -1, 1, 1).expand_as(partials[0].lse)
        partials.append(Partial(torch.zeros_like(partials[0].output), lse))
    return merge(partials).output.flatten(1, 2).to(query.dtype)


def _attend_part(
    query: Tensor,
    part: CodedTokens | ExactTokens,
    mask: Mask,
    frame: KeyFrame,
    softcap: float | None,
) -> Partial:
    """Online softmax over the blocks of one set of tokens; query (b, h, g, q, d) already scaled.

    Heads that the part does not hold see nothing.
    """
    kv_heads = query.shape[1]
    if part.heads is not None:
        query, mask = query[:, list(part.heads)], mask.of_heads(part.heads, kv_heads)
    _, heads, group, q_len, _ = query.shape
    flat = query.flatten(2, 3)
    step = max(64, min(2048, _LOGITS // flat.shape[:-1].numel()))
    top = flat.new_full((*flat.shape[:-1], 1), _MASKED)
    total = torch.zeros_like(top)
    output: Tensor | float = 0.0
    for keys, values, slots in _blocks(part, frame, step):
        logits = flat @ keys.mT
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.unflatten(2, (group, q_len))
        bias = mask.bias(slots, q_len, heads)
        plain = bias.dtype == torch.bool
        logits = logits.masked_fill(~bias, _MASKED) if plain else logits + bias.to(logits.dtype)
        logits = logits.flatten(2, 3)
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        safe = torch.where(new_top == _MASKED, 0.0, new_top)
        weight, decay = torch.exp(logits - safe), torch.exp(top - safe)
        total = total * decay + weight.sum(-1, keepdim=True)
        output = output * decay + weight @ values
        top = new_top
    assert isinstance(output, Tensor)
    output = output / total.clamp(min=1e-38)
    if isinstance(part, CodedTokens):  # values were left in transform space: undo it once
        output = part.value_quantizer.leave(output, part.value_centre)
    lse = torch.where(total > 0, top + total.clamp(min=1e-38).log(), _MASKED)
    mine = Partial(*(x.unflatten(2, (group, q_len)) for x in (output, lse)))
    return Partial(
        spread(mine.output, part.heads, kv_heads, 0.0),
        spread(mine.lse, part.heads, kv_heads, _MASKED),
    )


def _blocks(
    part: CodedTokens | ExactTokens, frame: KeyFrame, step: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys (post-RoPE), values (in transform space if coded) and slots, `step` tokens at a time."""
    device = part.device
    slots = part.slots.positions(device)
    for begin in range(0, part.slots.count, step):
        block = slice(begin, begin + step)
        at = slots[..., block]
        if isinstance(part, ExactTokens):
            yield part.keys[:, :, block].float(), part.values[:, :, block].float(), at
        else:
            tokens = part.part(block)
            yield frame.leave(tokens.keys(), at), tokens.value_coordinates(), at
