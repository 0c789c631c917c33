"""What a compressed cache will take, told from a model's config before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nexusquant.config import MAX_BITS, CompressionConfig
from nexusquant.hf.compressing import UNSEEN_BITS
from nexusquant.hf.coverage import (
    CODES,
    DECODED,
    EXACT,
    KEPT,
    NOTHING,
    STATE,
    WHOLE,
    LayerCoverage,
)

_GAIN_BITS = 8  # four each for a key and a value
_POSITION_BYTES = 4  # per token and RoPE flavour
_FULL_PRECISION = 2  # bytes per element of what stays uncoded


def expected_bytes(
    config: CompressionConfig | None,
    layers: Sequence[LayerCoverage],
    tokens: int,
    tail: float | None = None,
) -> int:
    """Bytes of one sequence's cache in a 16-bit model, behind so many tokens.

    Within some percent of what is measured, from about a thousand tokens on; states of linear
    attention are not counted.

    Args:
        config: how it is compressed; None for the uncompressed cache.
        layers: as `cover` gives them.
        tail: tokens that wait uncoded; None for half of what fits, the mean while decoding.
    """
    if config is not None and tail is None:
        tail = config.residual_length / 2
    mixed = any(layer.window is None and layer.elements for layer in layers)
    total = sum(_layer_bytes(config, layer, tokens, tail or 0, mixed) for layer in layers)
    if config is not None:
        rotated = [x.window for x in layers if x.treatment in (CODES, DECODED, KEPT)]
        total += _POSITION_BYTES * tokens * len(set(rotated))
    return round(total)


def longest_context(
    config: CompressionConfig | None, layers: Sequence[LayerCoverage], budget: int
) -> int | None:
    """Tokens whose cache fits into `budget` bytes, None without a limit."""
    fits, fails = 0, 1
    while expected_bytes(config, layers, fails) <= budget:
        fits, fails = fails, 2 * fails
        if fails > 1 << 40:
            return None
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if expected_bytes(config, layers, middle) <= budget:
            fits = middle
        else:
            fails = middle
    return fits


def _layer_bytes(
    config: CompressionConfig | None,
    layer: LayerCoverage,
    tokens: int,
    tail: float,
    mixed: bool,
) -> float:
    if layer.treatment in (STATE, NOTHING):
        return 0
    held = tokens if layer.window is None else min(tokens, layer.window - 1)
    exact = layer.elements * _FULL_PRECISION
    if config is None or layer.treatment == EXACT:
        return held * exact
    whole = layer.treatment == WHOLE
    evicted = layer.window is None and layer.treatment not in (WHOLE, KEPT)
    keep = 1 - config.evict_ratio if evicted else 1.0
    if config.codec == "exact":
        return held * keep * exact
    bits = [config.key_bits, config.value_bits]
    if whole:
        bits = [max(b, UNSEEN_BITS) for b in bits]
    if layer.window is not None and mixed:
        more = math.log2(max(tokens / layer.window, 1)) / 2
        bits = [min(b + more, MAX_BITS) for b in bits]
    tail = min(held, tail)
    sinks = 0 if layer.window is not None else min(held - tail, config.sinks)
    coded = held - tail - sinks
    vectors = bits[0] * layer.key_dim + bits[1] * layer.value_dim + _GAIN_BITS
    shares = (1.0,) if whole else config.tier_shares
    spread = [min(8 * keep * share, 1.0) for share in shares]  # a byte per gap or a bit per slot
    slots = sum(spread) if keep < 1 or len(shares) > 1 else 0.0
    coded_bytes = coded * layer.kv_heads * (keep * vectors + slots) / 8
    return coded_bytes + (tail + sinks + 1) * exact  # one token's worth of means
