"""Tokens coded once more, from their own codes."""

from __future__ import annotations

from dataclasses import replace

from nexusquant.math.gains import LIMIT
from nexusquant.quantizer import Centre, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens


def coded_again(
    tokens: CodedTokens,
    slots: Slots,
    centres: tuple[Centre, Centre],
    quantizers: tuple[Quantizer, Quantizer],
) -> CodedTokens:
    """The same tokens, at `slots`, by other quantizers around the same centres.

    What the first code made larger than any gain is brought back within reach.
    """
    own = tokens.key_quantizer, tokens.value_quantizer
    if quantizers == own:
        return replace(tokens, slots=slots)
    gains = tokens.gains & 15, tokens.gains >> 4
    sides = zip(own, (tokens.key_rows, tokens.value_rows), gains, centres, strict=True)
    vectors = []
    for quantizer, rows, gain, centre in sides:
        y = quantizer.coordinates(rows, gain)
        size = y.square().mean(-1, keepdim=True).sqrt()
        y *= (0.99 * LIMIT / size.clamp(min=1e-9)).clamp(max=1.0)
        vectors.append(quantizer.leave(y, centre))
    return CodedTokens.encode(vectors[0], vectors[1], slots, centres, quantizers)
