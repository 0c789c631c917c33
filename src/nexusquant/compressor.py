"""One layer's chunk of keys and values to stored tokens: score, keep, un-rotate, code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.allocation import uniform_layout
from nexusquant.budget import Selection, select_tokens
from nexusquant.config import CompressionConfig
from nexusquant.errors import NonFiniteError
from nexusquant.math.rope import KeyFrame
from nexusquant.quantizer import Quantizer
from nexusquant.scorers import ScoreInputs, get_scorer
from nexusquant.tokens import BatchFn, CodedTokens, ExactTokens, Slots, gather_tokens

_WORTH_A_COPY = 32


@dataclass(frozen=True)
class Chunk:
    """New tokens of one layer at slots start, start + 1, ...

    Args:
        keys, values: (batch, kv_heads, tokens, dim), keys post-RoPE.
        start: slot of the first token.
        valid: (batch, tokens) bool, False for padding; None if all are real.
        queries: (batch, query_heads, q_len, dim) post-RoPE, of the last q_len tokens; None if
            nothing may be evicted from this chunk (tokens that were decoded one by one).
        scaling: factor on the logits.
        softcap: logit soft cap, if the model has one.
        layer_idx: for messages and the random scorer.
    """

    keys: Tensor
    values: Tensor
    start: int
    valid: Tensor | None = None
    queries: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    layer_idx: int = 0


@dataclass(frozen=True)
class Stored:
    """The compressed past of one layer: uncoded sinks, then the body. Immutable."""

    sinks: ExactTokens | None = None
    body: CodedTokens | ExactTokens | None = None

    def parts(self) -> Iterator[CodedTokens | ExactTokens]:
        """What there is, oldest first."""
        yield from (part for part in (self.sinks, self.body) if part is not None)

    def map(self, fn: BatchFn) -> Stored:
        """Apply a batch operation to everything stored."""
        return Stored(self.sinks and self.sinks.map(fn), self.body and self.body.map(fn))

    def drop_before(self, slot: int) -> Stored:
        """Without the tokens before `slot`, once enough of them are worth a copy."""
        if self.body is None:
            return self
        count = self.body.slots.leading_before(slot)
        if count == self.body.slots.count:
            return replace(self, body=None)
        return self if count < _WORTH_A_COPY else replace(self, body=self.body.drop(count))

    @property
    def count(self) -> int:
        """Entries per head, of the longest batch row."""
        return sum(part.slots.count for part in self.parts())


class _QueryRope:
    """`ScoringRope` of one chunk: its queries' slots and the positions that follow."""

    def __init__(self, frame: KeyFrame, last_slot: int, dim: int) -> None:
        self.frame, self.last_slot, self.dim = frame, last_slot, dim

    def remove(self, queries: Tensor) -> Tensor:
        first = self.last_slot - queries.shape[2] + 1
        slots = torch.arange(first, self.last_slot + 1, device=queries.device).view(1, 1, -1)
        return self.frame.remove(queries, slots)

    def average_rotation(self, count: int) -> Tensor | None:
        assert self.frame.table is not None
        return self.frame.table.average_rotation(count, self.dim)


def compress(
    config: CompressionConfig, past: Stored, chunk: Chunk, frame: KeyFrame | None = None
) -> Stored:
    """`past` with the chunk's kept tokens appended.

    Args:
        frame: coordinates for coding keys; None leaves them as they are (also what a
            `CodedTokens` past of the same layer must have been coded with).

    Raises:
        NonFiniteError: NaN or infinity among the tokens to keep, or in their scores.
    """
    frame = frame or KeyFrame(None, 0)
    try:
        kept = _select(config, past, chunk, frame)
        sinks = _sinks(config, chunk, kept.sinks) if kept.sinks.shape[-1] else past.sinks
        if not kept.kept.shape[-1]:
            return replace(past, sinks=sinks)
        return Stored(sinks, _encode(config, past.body, chunk, kept.kept, frame))
    except NonFiniteError as error:
        stop = chunk.start + chunk.keys.shape[2]
        where = f"layer {chunk.layer_idx}, tokens {chunk.start} to {stop - 1}"
        raise NonFiniteError(f"{where}: {error}") from error


def _sinks(config: CompressionConfig, chunk: Chunk, index: Tensor) -> ExactTokens:
    """The tokens at `index` (batch, sinks), uncoded."""
    dtype = chunk.keys.dtype
    if config.codec == "e8" and dtype.itemsize > 2:
        dtype = torch.float16
    return _exact(chunk, index[:, None], dtype)


def _exact(chunk: Chunk, index: Tensor, dtype: torch.dtype) -> ExactTokens:
    """The tokens at `index` (batch, heads or 1, n), uncoded."""
    tokens = ExactTokens.select(chunk.keys, chunk.values, index, chunk.start, dtype)
    for name, x in (("keys", tokens.keys), ("values", tokens.values)):
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(f"NaN or infinite {name}")
    return tokens


def _select(config: CompressionConfig, past: Stored, chunk: Chunk, frame: KeyFrame) -> Selection:
    """Which candidates become sinks and which are kept."""
    batch, heads, tokens, _ = chunk.keys.shape
    first = past.sinks is None and past.body is None
    sinks = config.sinks if first else 0
    evict_ratio = config.evict_ratio if chunk.queries is not None else 0.0
    scores = None
    if evict_ratio and chunk.queries is not None:
        last = chunk.start + tokens - 1
        rope = _QueryRope(frame, last, chunk.keys.shape[-1]) if frame.table else None
        inputs = ScoreInputs(
            chunk.queries, chunk.keys, chunk.values, chunk.valid, chunk.scaling, chunk.softcap,
            sinks, rope, config.seed, chunk.layer_idx,
        )  # fmt: skip
        scores = get_scorer(config.scorer).score(inputs)
    return select_tokens(
        scores, batch=batch, kv_heads=heads, tokens=tokens, valid=chunk.valid,
        evict_ratio=evict_ratio, sinks=sinks, recent=config.recent, per_head=config.per_head,
        device=chunk.keys.device,
    )  # fmt: skip


def _encode(
    config: CompressionConfig,
    past: CodedTokens | ExactTokens | None,
    chunk: Chunk,
    index: Tensor,
    frame: KeyFrame,
) -> CodedTokens | ExactTokens:
    """The kept tokens behind `past`, in the config's codec."""
    if config.codec == "exact":
        new = _exact(chunk, index, chunk.keys.dtype)
        return past.append(new) if isinstance(past, ExactTokens) else new
    empty = (index < 0)[..., None]
    slots = torch.where(index < 0, -1, index + chunk.start)
    keys = frame.enter(gather_tokens(chunk.keys, index), slots).masked_fill(empty, 0)
    values = gather_tokens(chunk.values, index).float().masked_fill(empty, 0)
    if isinstance(past, CodedTokens):
        key_mean, value_mean = past.key_mean, past.value_mean
        key_quantizer, value_quantizer = past.key_quantizer, past.value_quantizer
    else:
        key_mean, value_mean = (_mean(x, empty) for x in (keys, values))
        key_quantizer, value_quantizer = (
            Quantizer(
                uniform_layout(x.shape[1], x.shape[-1], bits), config.transform,
                config.levels, config.overload,
            )
            for x, bits in ((keys, config.key_bits), (values, config.value_bits))
        )  # fmt: skip
    new_codes = CodedTokens(
        key_quantizer.encode(keys, key_mean),
        value_quantizer.encode(values, value_mean),
        key_mean, value_mean, Slots.of(slots), key_quantizer, value_quantizer,
    )  # fmt: skip
    return past.append(new_codes) if isinstance(past, CodedTokens) else new_codes


def _mean(x: Tensor, empty: Tensor) -> Tensor:
    """Mean over the filled entries of (batch, heads, n, dim), (batch, heads, 1, dim) fp16."""
    filled = (~empty).sum(2, keepdim=True).clamp(min=1)
    mean = x.sum(2, keepdim=True) / filled
    return mean.half() if bool((mean.abs() < 65504).all()) else mean
