"""Blocks coded on the E8 lattice, without a profile: near-lossless at the default rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexusquant import nxq
from nexusquant.errors import ConfigError, FormatError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, GROUP
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.vllm.blocks import BlockCodec, Layers, Shapes, check_head, dump, head, load

_STORED = torch.bfloat16  # means and scales: what is subtracted and divided by is what is stored


class E8Codec(BlockCodec):
    """Every token's vector in a Hadamard frame, with a gain of its own, as E8 codewords.

    A block carries per layer and head the mean of its keys and the size of keys and of values; what
    is left of a vector is coded at `bits` per element. Keys are coded as they are, rotated. All
    layers are coded in one call: their heads must have one dimension.

    Args:
        bits: 1 to 8 per element of keys and values.
    """

    name = "e8"
    version = 1

    def __init__(self, bits: int = 8) -> None:
        if type(bits) not in (int, float) or bits not in BITS:  # JSON may say 8.0
            raise ConfigError(f"bits={bits!r}: the codec e8 has {', '.join(map(str, BITS))}.")
        self.bits = int(bits)

    def identity(self) -> dict[str, Any]:
        """Name, version and rate."""
        return {**super().identity(), "bits": self.bits}

    def encode(self, keys: Layers, values: Layers, first_position: int) -> bytes:
        """Codes, gains and centres of all layers, one chunk each per side.

        Raises:
            ConfigError: heads of several dimensions, or of one that is no multiple of 8.
            NonFiniteError: NaN or infinity.
        """
        streams: dict[str, list[memoryview]] = {}
        for name, layers in (("keys", keys), ("values", values)):
            x = torch.cat(list(layers))[None].float()
            mean = x.mean(2, keepdim=True) if name == "keys" else x.new_zeros(1, 1, 1, 1)
            mean = mean.to(_STORED)
            size = (x - mean.float()).square().mean((2, 3), keepdim=True).sqrt()
            scale = size.clamp(min=torch.finfo(_STORED).tiny).to(_STORED)
            rows, gains = self._quantizer(x).encode(x, Centre(mean.float(), scale.float()))
            streams[name] = [dump(part) for part in (rows, gains, mean, scale)]
        return nxq.pack(head(self, keys, values, first_position), streams)

    def decode(
        self, blob: bytes, first_position: int, shapes: Shapes, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values within the code's distortion."""
        sides: list[list[Tensor]] = []
        with nxq.Reader.open(blob) as reader:
            check_head(self, reader.meta, shapes, first_position)
            for name, side in zip(("keys", "values"), zip(*shapes, strict=True), strict=True):
                counts = [shape[0] for shape in side]
                heads, tokens, dim = sum(counts), side[0][1], side[0][2]
                centre = (1, heads, 1, dim) if name == "keys" else (1, 1, 1, 1)
                parts = (
                    (torch.uint8, (1, heads * dim // GROUP * self.bits, tokens)),
                    (torch.uint8, (1, heads, tokens)),
                    (_STORED, centre),
                    (_STORED, (1, heads, 1, 1)),
                )
                rows, gains, mean, scale = (
                    load(reader.read(name, chunk), dtype, shape).to(like.device)
                    for chunk, (dtype, shape) in enumerate(parts)
                )
                if gains.numel() and int(gains.max()) > 15:
                    raise FormatError(f"gains of {name} beyond 15.")
                empty = torch.empty(1, heads, 0, dim)
                x = self._quantizer(empty).decode(rows, gains, Centre(mean.float(), scale.float()))
                sides.append(list(x[0].to(like.dtype).split(counts)))
        return sides[0], sides[1]

    def _quantizer(self, x: Tensor) -> Quantizer:
        """For x (1, heads of all layers, tokens, dim)."""
        heads, dim = x.shape[1], x.shape[3]
        if dim % GROUP:
            raise ConfigError(f"heads of {dim} dimensions, the codec e8 needs a multiple of 8.")
        layout = RowLayout(((self.bits,) * (dim // GROUP),) * heads)
        return Quantizer(layout, Orthonormal("hadamard", dim))
