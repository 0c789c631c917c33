"""Blocks of keys and values to bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nexusquant import nxq
from nexusquant.errors import FormatError

Layers = Sequence[Tensor]
"""Per layer (heads, tokens, dim)."""

Shape = tuple[int, int, int]
Shapes = Sequence[tuple[Shape, Shape]]
"""Per layer the shape of a block's keys and of its values."""


class BlockCodec(ABC):
    """Encodes one block of all layers of a rank.

    A codec has no state that depends on what it has coded, and is used by several threads at once.

    Attributes:
        name: of the codec.
        version: of its bytes. Another version is another namespace.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def identity(self) -> dict[str, Any]:
        """What blocks of this codec are told from others by: a JSON object, part of their keys."""
        return {"name": self.name, "version": self.version}

    @abstractmethod
    def encode(self, keys: Layers, values: Layers, first_position: int) -> bytes:
        """Bytes from keys and values where they are, keys rotated as the model has them.

        Args:
            first_position: of the block's first token in its sequence.
        """

    @abstractmethod
    def decode(
        self, blob: bytes, first_position: int, shapes: Shapes, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all layers.

        Args:
            shapes: what the cache has room for.
            like: dtype and device of what is returned.

        Raises:
            FormatError: bytes that are damaged, or of a block of other shapes or another place.
        """


class RawCodec(BlockCodec):
    """Keys and values as they are, bit by bit."""

    name = "raw"
    version = 1

    def encode(self, keys: Layers, values: Layers, first_position: int) -> bytes:
        """One chunk per layer and side."""
        meta = head(self, keys, values, first_position)
        return nxq.pack(
            meta, {"keys": [dump(x) for x in keys], "values": [dump(x) for x in values]}
        )

    def decode(
        self, blob: bytes, first_position: int, shapes: Shapes, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same bits, if the dtype is the same."""
        with nxq.Reader.open(blob) as reader:
            dtype = check_head(self, reader.meta, shapes, first_position)
            sides = zip(*shapes, strict=True)
            keys, values = (
                [
                    load(reader.read(name, layer), dtype, shape).to(like)
                    for layer, shape in enumerate(side)
                ]
                for name, side in zip(("keys", "values"), sides, strict=True)
            )
        return keys, values


def head(codec: BlockCodec, keys: Layers, values: Layers, first_position: int) -> dict[str, Any]:
    """What the header of a block says, checked by `check_head`."""
    return {
        "codec": codec.identity(),
        "dtype": str(keys[0].dtype).removeprefix("torch."),
        "shapes": [[list(k.shape), list(v.shape)] for k, v in zip(keys, values, strict=True)],
        "first_position": first_position,
    }


def check_head(
    codec: BlockCodec, meta: Mapping[str, Any], shapes: Shapes, first_position: int
) -> torch.dtype:
    """The dtype that a block was made from.

    Raises:
        FormatError: another codec's block, or one of other shapes or another place.
    """
    expected = {
        "codec": codec.identity(),
        "shapes": [[list(k), list(v)] for k, v in shapes],
        "first_position": first_position,
    }
    return check_meta(meta, expected)


def check_meta(meta: Mapping[str, Any], expected: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a block says it was made from, if it says what is expected.

    Raises:
        FormatError: names what is different.
    """
    wrong = sorted(name for name in expected if meta.get(name) != expected[name])
    dtype = getattr(torch, str(meta.get("dtype")), None)
    if wrong or not isinstance(dtype, torch.dtype):
        raise FormatError(f"another block than was asked for ({', '.join(wrong) or 'dtype'}).")
    return dtype


def dump(x: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU."""
    return x.contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def load(chunk: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor that `dump` was given.

    Raises:
        FormatError: more or fewer bytes than such a tensor has.
    """
    count = torch.Size(shape).numel()
    if len(chunk) != count * dtype.itemsize:
        raise FormatError(f"{len(chunk)} bytes for {count} elements of {dtype}.")
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(chunk), dtype=dtype).view(tuple(shape))
