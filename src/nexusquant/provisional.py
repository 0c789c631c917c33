"""Coding by a profile that the very prompt builds: twice, as bits are shared out at its end.

All layers share one budget, so nothing final can be coded before the last of them is known. Until
the pass is over, a layer is coded with `MORE_BITS` more, by what is known of it alone; then its
codes are coded once more. Noise of the first code is a small part of both.
"""

from __future__ import annotations

from dataclasses import replace

from nexusquant.config import MAX_BITS, CompressionConfig
from nexusquant.plan import Coding, with_profile
from nexusquant.profile import Profile
from nexusquant.recoding import coded_again
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens

MORE_BITS = 1.5
"""Memory peaks at so much more: `lossless` takes some 3.5 bits per element then, 22% of fp16."""

MOST_BITS = 4
"""Beyond, tiers would meet at the highest rate, and sharing out matters little."""


def provisional(config: CompressionConfig) -> CompressionConfig:
    """`config` with more bits."""
    bits = (min(x + MORE_BITS, MAX_BITS) for x in (config.key_bits, config.value_bits))
    return config.replace(**dict(zip(("key_bits", "value_bits"), bits, strict=True)))


def final(config: CompressionConfig, stored: Stored, profile: Profile | None) -> Stored:
    """What was coded provisionally, as `config` and the complete profile (None: none) say."""
    parts = [part for part in stored.body if isinstance(part, CodedTokens)]
    if not parts:
        return stored
    before = Coding.of(parts)
    after = with_profile(config, before, profile)
    body, whole = [], iter(range(len(before.tiers)))
    for part in parts:
        if part.heads is None:  # one per tier, in their order
            tier = next(whole)
        else:
            mine = part.key_quantizer, part.value_quantizer
            theirs = [tuple(x.of_heads(part.heads) for x in pair) for pair in before.tiers]
            tier = theirs.index(mine)
        key, value = (x.of_heads(part.heads) for x in after.tiers[tier])
        body.append(coded_again(part, part.slots, after.centres, (key, value)))
    return replace(stored, body=tuple(body))
