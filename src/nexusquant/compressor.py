"""One layer's chunk of keys and values to stored tokens: score, keep, un-rotate, code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nexusquant.budget import Selection, select_tokens, split_heads, split_tiers
from nexusquant.config import CompressionConfig
from nexusquant.errors import NonFiniteError
from nexusquant.frame import KeyFrame
from nexusquant.plan import Coding, plan_coding
from nexusquant.profile import Profile
from nexusquant.scorers import ScoreInputs, checked_scores, get_scorer
from nexusquant.slots import BatchFn, Slots
from nexusquant.tokens import CodedTokens, ExactTokens, count_heads, gather_tokens

_WORTH_A_COPY = 32
Tokens = TypeVar("Tokens", CodedTokens, ExactTokens)


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
        received: (batch, kv_heads, tokens) from a second pass, for scorers that ask for one.
    """

    keys: Tensor
    values: Tensor
    start: int
    valid: Tensor | None = None
    queries: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    layer_idx: int = 0
    received: Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """The compressed past of one layer. Immutable.

    Attributes:
        sinks: first tokens, uncoded.
        body: everything else: tiers of codes, most important first, or one set of uncoded tokens;
            behind them what only some heads have (`split_heads`), with codes tier by tier.
    """

    sinks: ExactTokens | None = None
    body: tuple[CodedTokens, ...] | tuple[ExactTokens, ...] = ()

    def parts(self) -> Iterator[CodedTokens | ExactTokens]:
        """What holds tokens."""
        if self.sinks is not None:
            yield self.sinks
        yield from (part for part in self.body if part.slots.count)

    def map(self, fn: BatchFn) -> Stored:
        """Apply a batch operation to everything stored."""
        done: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:  # all parts share their centres, and go on sharing them
            if id(x) not in done:
                done[id(x)] = fn(x)
            return done[id(x)]

        return self.with_body(
            [part.map(once) for part in self.body], self.sinks and self.sinks.map(once)
        )

    def drop_before(self, slot: int) -> Stored:
        """Without the tokens before `slot`, once enough of them are worth a copy."""
        body = []
        for part in self.body:
            count = part.slots.leading_before(slot)
            worth = count >= _WORTH_A_COPY or count == part.slots.count
            body.append(part.drop(count) if count and worth else part)
        return self.with_body(body)

    def with_body(self, body: list[Any], sinks: ExactTokens | None = None) -> Stored:
        """The same sinks (or others) with another body, less what only some heads had."""
        body = [part for part in body if part.slots.count or part.heads is None]
        return Stored(sinks or self.sinks, tuple(body))

    @property
    def count(self) -> float:
        """Entries per head, of the longest batch row; the mean if heads differ."""
        entries = sum(part.slots.count * part.kv_heads for part in self.parts())
        return entries / self.kv_heads if entries else 0.0

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer. There must be a part."""
        return count_heads(self.body or ([] if self.sinks is None else [self.sinks]))


class _QueryRope:
    """`ScoringRope` of one chunk: its queries' slots and the positions that follow."""

    def __init__(self, frame: KeyFrame, last_slot: int, dim: int) -> None:
        self.frame, self.last_slot, self.dim = frame, last_slot, dim

    def remove(self, queries: Tensor, step: int = 1) -> Tensor:
        first = self.last_slot - step * (queries.shape[2] - 1)
        slots = torch.arange(first, self.last_slot + 1, step, device=queries.device)
        return self.frame.remove(queries, slots.view(1, 1, -1))

    def average_rotation(self, count: int) -> Tensor | None:
        assert self.frame.table is not None
        return self.frame.table.average_rotation(count, self.dim)


def compress(
    config: CompressionConfig,
    past: Stored,
    chunk: Chunk,
    frame: KeyFrame | None = None,
    profile: Profile | None = None,
) -> Stored:
    """`past` with the chunk's kept tokens appended.

    Args:
        frame: coordinates for coding keys; None leaves them as they are (also what a
            `CodedTokens` past of the same layer must have been coded with).
        profile: of the model, if it knows this layer; what a past was coded with stays in force.

    Raises:
        ConfigError: the scorer returned something else than scores.
        NonFiniteError: NaN or infinity among the tokens to keep, or in the scores.
    """
    frame = frame or KeyFrame(None, 0)
    try:
        scores = _scores(config, past, chunk, frame)
        kept = _select(config, past, chunk, scores)
        sinks = _sinks(config, chunk, kept.sinks) if kept.sinks.shape[-1] else past.sinks
        if not kept.kept.shape[-1]:
            return replace(past, sinks=sinks)
        if config.codec == "exact":
            parts = [_exact(chunk, at, chunk.keys.dtype, h) for h, at in split_heads(kept.kept)]
            old = [part for part in past.body if isinstance(part, ExactTokens)]
            return Stored(sinks, _appended(old, parts))
        return Stored(sinks, _encode(config, past, chunk, kept.kept, scores, frame, profile))
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


def _exact(
    chunk: Chunk, index: Tensor, dtype: torch.dtype, heads: tuple[int, ...] | None = None
) -> ExactTokens:
    """The tokens at `index` (batch, heads or 1, n) of some heads (None: all), uncoded."""
    keys, values = (_at_heads(x, heads) for x in (chunk.keys, chunk.values))
    tokens = ExactTokens.select(keys, values, index, chunk.start, dtype, heads)
    for name, x in (("keys", tokens.keys), ("values", tokens.values)):
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(f"NaN or infinite {name}")
    return tokens


def _scores(
    config: CompressionConfig, past: Stored, chunk: Chunk, frame: KeyFrame
) -> Tensor | None:
    """Importance (batch, kv_heads, tokens), if anything depends on it."""
    wanted = config.evict_ratio or (config.codec == "e8" and config.tiers)
    if chunk.queries is None or not wanted:
        return None
    last = chunk.start + chunk.keys.shape[2] - 1
    rope = _QueryRope(frame, last, chunk.keys.shape[-1]) if frame.table else None
    inputs = ScoreInputs(
        chunk.queries, chunk.keys, chunk.values, chunk.valid, chunk.scaling, chunk.softcap,
        _first_sinks(config, past), rope, config.seed, chunk.layer_idx,
        chunk.received,
    )  # fmt: skip
    return checked_scores(get_scorer(config.scorer).score(inputs), inputs, config.scorer)


def _first_sinks(config: CompressionConfig, past: Stored) -> int:
    return config.sinks if past.sinks is None and not past.body else 0


def _select(
    config: CompressionConfig, past: Stored, chunk: Chunk, scores: Tensor | None
) -> Selection:
    """Which candidates become sinks and which are kept."""
    batch, heads, tokens, _ = chunk.keys.shape
    return select_tokens(
        scores, batch=batch, kv_heads=heads, tokens=tokens, valid=chunk.valid,
        evict_ratio=config.evict_ratio if chunk.queries is not None else 0.0,
        sinks=_first_sinks(config, past), recent=config.recent, per_head=config.per_head,
        device=chunk.keys.device, head_safeguard=config.head_safeguard,
    )  # fmt: skip


def _encode(
    config: CompressionConfig,
    past: Stored,
    chunk: Chunk,
    index: Tensor,
    scores: Tensor | None,
    frame: KeyFrame,
    profile: Profile | None,
) -> tuple[CodedTokens, ...]:
    """The kept tokens behind the past ones: tier by tier those of all heads, then the others."""
    empty = (index < 0)[..., None]
    slots = torch.where(index < 0, -1, index + chunk.start)
    everywhere = torch.arange(chunk.keys.shape[2], device=index.device).view(1, 1, -1)
    keys = gather_tokens(frame.enter(chunk.keys, everywhere + chunk.start), index)
    values = gather_tokens(chunk.values, index).float()
    if bool(empty.any()):
        keys, values = keys.masked_fill(empty, 0), values.masked_fill(empty, 0)
    old = [part for part in past.body if isinstance(part, CodedTokens)]

    def code(coding: Coding) -> list[CodedTokens]:
        if scores is None or len(coding.tiers) != len(config.tier_shares):  # as the past has them
            members = _unscored(index, len(coding.tiers))
        elif config.per_head:
            members = split_tiers(scores, index.expand(-1, keys.shape[1], -1), config.tier_shares)
        else:
            members = split_tiers(scores, index, config.tier_shares)
        new = []
        for entries, (key, value) in zip(members, coding.tiers, strict=True):
            wide = slots.expand(-1, entries.shape[1], -1)
            for heads, at in split_heads(entries):
                slot = _at_heads(wide, heads).gather(2, at.clamp(min=0))
                new.append(
                    CodedTokens.encode(
                        gather_tokens(_at_heads(keys, heads), at),
                        gather_tokens(_at_heads(values, heads), at),
                        Slots.of(torch.where(at < 0, -1, slot)), coding.centres,
                        (key.of_heads(heads), value.of_heads(heads)),
                    )
                )  # fmt: skip
        return new

    def anew(all_alike: bool) -> list[CodedTokens]:
        return code(plan_coding(config, keys, values, empty, profile, chunk.layer_idx, all_alike))

    try:
        new = code(Coding.of(old)) if old else anew(all_alike=False)
    except NonFiniteError:  # out of reach of vectors that are all alike, if not worse
        new = anew(all_alike=True)
    return _appended(old, sorted(new, key=lambda part: part.heads is not None))


def _at_heads(x: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """x (batch, kv_heads, ...) at some of the heads, None for all."""
    return x if heads is None else x[:, list(heads)]


def _appended(old: Sequence[Tokens], new: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Every new part behind the old one that it continues; those that continue none come last."""
    body: list[Tokens] = []
    left = list(new)
    for part in old:
        at = next((i for i, more in enumerate(left) if more.continues(part)), None)
        body.append(part if at is None else part.append(left.pop(at)))
    return tuple(body + left)


def _unscored(index: Tensor, tiers: int) -> list[Tensor]:
    """Nobody knows how important decoded tokens will be: the second tier of several is for them."""
    everything = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    everything = torch.where(index < 0, -1, everything)
    nothing = everything[..., :0]
    return [everything if i == min(1, tiers - 1) else nothing for i in range(tiers)]
