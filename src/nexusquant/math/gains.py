"""Token gains: four bits per token and head for the size of a vector, relative to its sequence.

Sixteen values, finer where vectors are common (three per octave) and reaching up to 90 for the rare
large ones. The quantizer divides by the *decoded* gain, so the coarse steps cost no accuracy of
their own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_OCTAVES = (*(k / 3 - 2 for k in range(12)), 2.25, 3.0, 4.25, 6.5)
GAINS = len(_OCTAVES)
LIMIT = 128.0
"""Largest RMS, relative to the sequence's, that has a code."""


@lru_cache(maxsize=8)
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 gains and the 15 boundaries between them, half way on the logarithmic scale."""
    octaves = torch.tensor(_OCTAVES, device=device)
    return torch.exp2(octaves), torch.exp2((octaves[1:] + octaves[:-1]) / 2)


def encode_gain(rms: Tensor) -> Tensor:
    """RMS (any shape, >= 0, fp32) to codes 0 to 15, uint8."""
    return torch.bucketize(rms, _table(rms.device)[1]).to(torch.uint8)


def decode_gain(code: Tensor) -> Tensor:
    """Codes 0 to 15 to fp32 gains."""
    return torch.nn.functional.embedding(code.int(), _table(code.device)[0][:, None])[..., 0]


def boundaries(device: torch.device) -> Tensor:
    """The 15 boundaries between gains, fp32."""
    return _table(device)[1]
