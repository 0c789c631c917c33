"""Token gains: one byte per token and head, the RMS of the coded vector on a logarithmic scale.

Eight steps per octave from 2^-15.9 to 2^15.9, which covers fp16; 0 means a zero vector. The
quantizer divides by the *decoded* gain, so the coarse step costs no accuracy of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS_PER_OCTAVE = 8
LIMIT = 2.0 ** (127 / STEPS_PER_OCTAVE)
"""Largest RMS that has a code, about 60,100."""


def encode_gain(rms: Tensor) -> Tensor:
    """RMS (any shape, >= 0, fp32) to uint8 codes. RMS below 2^-15.9 becomes 0."""
    code = torch.round(torch.log2(rms.clamp(min=1e-30)) * STEPS_PER_OCTAVE) + 128
    return torch.where(code < 1, 0.0, code.clamp(max=255)).to(torch.uint8)


def decode_gain(code: Tensor) -> Tensor:
    """uint8 codes to fp32 gains."""
    return torch.where(code == 0, 0.0, torch.exp2((code.float() - 128) / STEPS_PER_OCTAVE))
