"""What the golden files of all codecs are made of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden" / "prefix"
FINGERPRINT = "900d900d900d900d"


def noise(*shape: int, seed: int = 0) -> Tensor:
    """fp32 of a bell curve with variance 1, the same everywhere: integers, scaled once."""
    at = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 4 + seed * 1_000_003
    total = torch.zeros_like(at)
    for i in range(4):
        x = ((at + i) * 2_654_435_761) & 0xFFFF_FFFF
        x = ((x ^ (x >> 15)) * 739_982_445) & 0xFFFF_FFFF
        total += ((x ^ (x >> 12)) & 0xFFFF) - 0x8000
    return (total.float() / (1 << 15) * 0.8660254).view(shape)


def npz(arrays: dict[str, Any]) -> bytes:
    """Of fp32 numbers the first 16 bits of the fraction: the tests ask for no more."""
    few = {
        name: (x.view(np.int32) & -128).view(np.float32) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, **few)
    return file.getvalue()
