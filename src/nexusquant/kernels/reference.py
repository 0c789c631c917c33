"""The specification of every operator, in plain PyTorch on any device.

Whole keys or values are never materialised, a block is decoded, used and dropped. Parts are
combined by their log-sum-exp (Dao et al. 2022, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nexusquant.errors import NonFiniteError
from nexusquant.kernels.base import Coded, Entry, Exact, Partial, Request, exact, is_coded, spread
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import DISTORTION, GROUP, Book
from nexusquant.math.gains import GAINS, LIMIT, decode_gain, encode_gain

_LOGITS = 1 << 22  # logits held at a time
_MASKED = float("-inf")
_STEPS = 6  # gains tried above a vector's size: two octaves


class Reference:
    """See `nexusquant.kernels.base.Operator`."""

    name = "reference"

    def encode(
        self, x: Tensor, layout: RowLayout, book: Book, entry: Entry | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and gains of x (batch, heads, tokens, dim)."""
        y = x if entry is None else entry.enter(x)
        gains = _gains(y, layout, book)
        return layout.encode(y / decode_gain(gains)[..., None], book), gains

    def decode(self, rows: Tensor, gains: Tensor, layout: RowLayout, book: Book) -> Tensor:
        """Vectors in code space, (batch, heads, tokens, dim) fp32."""
        return layout.decode(rows, book) * decode_gain(gains)[..., None]

    def decode_attention(self, request: Request) -> Partial:
        """Attention to all parts, one after another."""
        kv_heads = request.kv_heads
        grouped = request.query.float().unflatten(1, (kv_heads, -1)) * request.scaling
        partials = [
            self._attend_part(grouped, part, request)
            for part in request.parts if part.slots.count
        ]  # fmt: skip
        if not partials:
            partials.append(_nothing(grouped, request.parts[0]))
        if request.sink_logits is not None:
            lse = request.sink_logits.float().view(1, kv_heads, -1, 1, 1).expand_as(partials[0].lse)
            partials.append(Partial(torch.zeros_like(partials[0].output), lse))
        return merge(partials)

    def _attend_part(self, query: Tensor, part: Coded | Exact, request: Request) -> Partial:
        """Online softmax over the blocks of one set of tokens; query (b, h, g, q, d) is scaled.

        Heads that the part does not hold see nothing.
        """
        kv_heads, mask, softcap = query.shape[1], request.mask, request.softcap
        if part.heads is not None:
            query, mask = query[:, list(part.heads)], mask.of_heads(part.heads, kv_heads)
        _, heads, group, q_len, _ = query.shape
        flat = query.flatten(2, 3)
        step = max(64, min(2048, _LOGITS // flat.shape[:-1].numel()))
        top = flat.new_full((*flat.shape[:-1], 1), _MASKED)
        total = torch.zeros_like(top)
        output: Tensor | float = 0.0
        for keys, values, slots in self._blocks(part, request, step):
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
        if is_coded(part):  # values were left in code space: undo it once
            output = part.spaces[1].leave(output, part.heads)
        lse = torch.where(total > 0, top + total.clamp(min=1e-38).log(), _MASKED)
        mine = Partial(*(x.unflatten(2, (group, q_len)) for x in (output, lse)))
        return Partial(
            spread(mine.output, part.heads, kv_heads, 0.0),
            spread(mine.lse, part.heads, kv_heads, _MASKED),
        )

    def _blocks(
        self, part: Coded | Exact, request: Request, step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys (post-RoPE), values (in code space if coded) and slots, `step` tokens at a time."""
        slots = part.slots.positions(request.query.device)
        for begin in range(0, part.slots.count, step):
            block = slice(begin, begin + step)
            at = slots[..., block]
            if not is_coded(part):
                held = exact(part)
                yield held.keys[:, :, block].float(), held.values[:, :, block].float(), at
                continue
            gains = part.gains[:, :, block]
            keys, values = (
                self.decode(rows[:, :, block], gain, layout, part.book)
                for rows, gain, layout in zip(
                    (part.key_rows, part.value_rows), (gains & 15, gains >> 4), part.layouts,
                    strict=True,
                )
            )  # fmt: skip
            keys = part.spaces[0].leave(keys, part.heads)
            yield request.frame.leave(keys, at), values, at


def _nothing(query: Tensor, part: Coded | Exact) -> Partial:
    """Attention of query (b, h, g, q, d) to no token."""
    dim = 8 * part.layouts[1].groups if is_coded(part) else exact(part).values.shape[-1]
    lse = query.new_full((*query.shape[:-1], 1), _MASKED)
    return Partial(query.new_zeros(*query.shape[:-1], dim), lse)


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint sets of tokens."""
    lse = torch.stack([part.lse for part in parts])
    top = lse.amax(0)
    weight = torch.exp(lse - torch.where(top == _MASKED, 0.0, top))
    total = weight.sum(0)
    output = sum(w * part.output for w, part in zip(weight, parts, strict=True))
    assert isinstance(output, Tensor)
    return Partial(output / total.clamp(min=1e-38), top + total.clamp(min=1e-38).log())


def _gains(y: Tensor, layout: RowLayout, book: Book) -> Tensor:
    """Gain codes (b, h, t) of vectors in code space: their RMS, unless that clips too much."""
    stored = layout.stored(y.device).repeat_interleave(GROUP, -1).float()
    count = stored.sum(-1, keepdim=True).clamp(min=1)
    rms = ((y * stored[:, None]).square().sum(-1) / count).sqrt()  # NaN if any is, or infinite
    if not bool((rms <= LIMIT).all()):
        raise too_large(int((~(rms <= LIMIT)).sum()), rms.numel())
    gains = encode_gain(rms)
    reach, price = _clipping(layout, book, y.device)
    clipped = _clipped(y, decode_gain(gains), reach[:, None], price[:, None])
    batch, head, token = (clipped > count * decode_gain(gains).square()).nonzero(as_tuple=True)
    if len(head):
        few = y[batch, head, token]
        gains[batch, head, token] = _best_gain(
            few, gains[batch, head, token], reach[head], price[head], count[head, 0]
        )
    return gains


def _clipping(layout: RowLayout, book: Book, device: torch.device) -> tuple[Tensor, Tensor]:
    """(heads, dim) largest level of every coordinate, and what squared error beyond it costs.

    The allocation gives bits where distortion costs most, so that it costs the same everywhere:
    the unit is the granular noise of a coordinate.
    """
    rates = torch.tensor(layout.rates)
    reach, price = torch.zeros(2, len(DISTORTION))
    for bits in set(rates.flatten().tolist()) - {0}:
        reach[bits], price[bits] = book[bits].levels()[-1], 1 / DISTORTION[bits]
    return tuple(x[rates].repeat_interleave(GROUP, -1).to(device) for x in (reach, price))


def too_large(bad: int, count: int) -> NonFiniteError:
    """The error about vectors that no gain fits."""
    return NonFiniteError(
        f"{bad} of {count} vectors are NaN, infinite or over {LIMIT:.0f} times as"
        " large as is usual there; they cannot be coded. Check the model's dtype and"
        " inputs, or use codec='exact'."
    )


def _clipped(y: Tensor, gain: Tensor, reach: Tensor, price: Tensor) -> Tensor:
    """What clipping costs vectors y (..., dim) coded with `gain` (...)."""
    beyond = (y.abs() - reach * gain[..., None]).clamp(min=0)
    return (beyond.square() * price).sum(-1)


def _best_gain(y: Tensor, codes: Tensor, reach: Tensor, price: Tensor, count: Tensor) -> Tensor:
    """The code, from `codes` (n,) up, with which clipping and granular noise of y (n, dim) cost
    least; reach and price (n, dim), count (n,) coded coordinates."""
    best, least = codes, torch.full_like(count, torch.inf)
    for step in range(_STEPS + 1):
        tried = (codes + step).clamp(max=GAINS - 1)
        gain = decode_gain(tried)
        cost = _clipped(y, gain, reach, price) + count * gain.square()
        best, least = torch.where(cost < least, tried, best), torch.minimum(cost, least)
    return best
