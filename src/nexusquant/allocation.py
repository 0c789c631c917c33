"""Bits per 8-dimension group. Uniform rates here: all a Hadamard frame can use."""

from __future__ import annotations

import math

from nexusquant.errors import UnsupportedError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import GROUP


def uniform_layout(heads: int, dim: int, bits: float) -> RowLayout:
    """Every head alike; a fractional rate gives the first groups one bit more than the rest.

    Raises:
        UnsupportedError: `dim` is not a multiple of 8.
    """
    if dim % GROUP:
        raise UnsupportedError(f"head_dim {dim} is not a multiple of {GROUP}.")
    groups = dim // GROUP
    low = math.floor(bits)
    more = round((bits - low) * groups)
    return RowLayout(((low + 1,) * more + (low,) * (groups - more),) * heads)
