"""One layer's chunk of keys and values to stored tokens: score, keep, un-rotate, code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.budget import Selection, select_tokens, split_heads, split_tiers
from nexusquant.config import CompressionConfig
from nexusquant.errors import NonFiniteError
from nexusquant.frame import KeyFrame, QueryRope
from nexusquant.fresh import settled, with_fresh_tokens
from nexusquant.plan import Coding, fresh_quantizers, plan_coding
from nexusquant.profile import Profile
from nexusquant.quantizer import Centre, Quantizer
from nexusquant.scorers import ScoreInputs, checked_scores, get_scorer
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens, appended, gather_tokens


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
            return Stored(sinks, appended(old, parts))
        return _encode(config, replace(past, sinks=sinks), chunk, kept.kept, scores, frame, profile)
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
    rope = QueryRope.of(frame, last, chunk.keys.shape[-1])
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


@dataclass(frozen=True)
class _Entries:
    """Kept tokens on their way to codes: keys in their frame, and values, both fp32.

    Args:
        keys, values: (batch, kv_heads, n, dim).
        slots: (batch, heads or 1, n), -1 where empty.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor

    @staticmethod
    def of(chunk: Chunk, index: Tensor, frame: KeyFrame) -> _Entries:
        """The tokens of a chunk at `index` (batch, heads or 1, n), -1 where empty."""
        empty = index < 0
        everywhere = torch.arange(chunk.keys.shape[2], device=index.device).view(1, 1, -1)
        keys = gather_tokens(frame.enter(chunk.keys, everywhere + chunk.start), index)
        values = gather_tokens(chunk.values, index).float()
        if bool(empty.any()):
            keys, values = (x.masked_fill(empty[..., None], 0) for x in (keys, values))
        return _Entries(keys, values, torch.where(empty, -1, index + chunk.start))

    def all(self) -> Tensor:
        """Every entry, as `coded` takes them."""
        everything = torch.arange(self.slots.shape[-1], device=self.slots.device)
        return torch.where(self.slots < 0, -1, everything)

    def coded(
        self,
        entries: Tensor,
        centres: tuple[Centre, Centre],
        quantizers: tuple[Quantizer, Quantizer],
    ) -> list[CodedTokens]:
        """Those at `entries` (batch, heads or 1, m): a part of all heads, then those of some."""
        wide = self.slots.expand(-1, entries.shape[1], -1)
        parts = []
        for heads, at in split_heads(entries):
            slot = _at_heads(wide, heads).gather(2, at.clamp(min=0))
            both = (_at_heads(x, heads) for x in (self.keys, self.values))
            keys, values = (gather_tokens(x, at) for x in both)
            pair = quantizers[0].of_heads(heads), quantizers[1].of_heads(heads)
            slots = Slots.of(torch.where(at < 0, -1, slot))
            parts.append(CodedTokens.encode(keys, values, slots, centres, pair))
        return parts


def _encode(
    config: CompressionConfig,
    past: Stored,
    chunk: Chunk,
    index: Tensor,
    scores: Tensor | None,
    frame: KeyFrame,
    profile: Profile | None,
) -> Stored:
    """The kept tokens behind the past ones: tier by tier those of all heads, then the others."""
    entries = _Entries.of(chunk, index, frame)
    decoded = chunk.queries is None and config.most_fresh > 0
    past = past if decoded else settled(past)
    old = [part for part in past.body if isinstance(part, CodedTokens)]
    known = Coding.of(old) if old else None

    def add(coding: Coding) -> Stored:
        if not decoded:
            return behind(past, coding, _members(config, entries, index, scores, coding))
        everything, most = entries.all(), config.most_fresh
        early, late = everything[..., :-most], everything[..., -most:]
        stored = past
        if early.shape[-1] or coding is not known:
            stored = behind(settled(past), coding, coding.unscored_members(early))
        pair = fresh_quantizers(config, coding)
        return with_fresh_tokens(config, stored, entries.coded(late, coding.centres, pair)[0])

    def behind(stored: Stored, coding: Coding, members: list[Tensor]) -> Stored:
        parts = [
            part
            for some, tier in zip(members, coding.tiers, strict=True)
            for part in entries.coded(some, coding.centres, tier)
        ]
        parts.sort(key=lambda part: part.heads is not None)
        body = [part for part in stored.body if isinstance(part, CodedTokens)]
        return stored.with_body(appended(body, parts))

    def anew(all_alike: bool) -> Stored:
        return add(
            plan_coding(
                config, entries.keys, entries.values, (entries.slots < 0)[..., None], profile,
                chunk.layer_idx, all_alike,
            )
        )  # fmt: skip

    try:
        return add(known) if known else anew(all_alike=False)
    except NonFiniteError:  # out of reach of vectors that are all alike, if not worse
        return anew(all_alike=True)


def _members(
    config: CompressionConfig,
    entries: _Entries,
    index: Tensor,
    scores: Tensor | None,
    coding: Coding,
) -> list[Tensor]:
    """Which entries each tier of a coding gets, (batch, heads or 1, n_tier)."""
    if scores is None or len(coding.tiers) != len(config.tier_shares):  # as the past has them
        return coding.unscored_members(entries.all())
    wide = index.expand(-1, entries.keys.shape[1], -1) if config.per_head else index
    return split_tiers(scores, wide, config.tier_shares)


def _at_heads(x: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """x (batch, kv_heads, ...) at some of the heads, None for all."""
    return x if heads is None else x[:, list(heads)]
