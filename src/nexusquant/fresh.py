"""Decoded tokens by age: more bits as long as few tokens follow, then the rate of the others.

What was written last is read more than the average token of a prompt, so it is coded at
`CompressionConfig.fresh_bits`, and once more, from those codes, when it is old, which adds the
noise of the first code to that of the second.
"""

from __future__ import annotations

from nexusquant.config import CompressionConfig
from nexusquant.plan import Coding
from nexusquant.recoding import coded_again
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, appended


def with_fresh_tokens(config: CompressionConfig, stored: Stored, tokens: CodedTokens) -> Stored:
    """`stored` with fresh tokens behind all others; if they are too many, half of those that may
    be fresh stay so: coding few at a time would take most of its time around the kernels."""
    fresh = stored.fresh
    if fresh is not None and not tokens.continues(fresh):
        stored, fresh = settled(stored), None
    together = tokens if fresh is None else fresh.append(tokens)
    stored = stored.with_fresh(together)
    count = together.slots.count
    return stored if count <= config.most_fresh else settled(stored, count - config.most_fresh // 2)


def settled(stored: Stored, count: int | None = None) -> Stored:
    """The oldest `count` fresh tokens (None: all) at the rate of decoded tokens in the body."""
    fresh = stored.fresh
    if fresh is None or count == 0:
        return stored
    old = fresh if count is None else fresh.part(slice(0, count))
    at = fresh.slots.positions(fresh.device)[..., :count]
    body = [part for part in stored.body if isinstance(part, CodedTokens)]
    coding = Coding.of(body)
    moved = coded_again(old, Slots.of(at), coding.centres, coding.tiers[coding.unscored])
    left = None if count is None else fresh.drop(count)
    return stored.with_body(appended(body, [moved])).with_fresh(left)
