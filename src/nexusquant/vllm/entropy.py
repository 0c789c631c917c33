"""Blocks in the package's storage codec: with a profile of the model, fewer bytes than `e8`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexusquant import nxq
from nexusquant.entropy.joint import JointCode
from nexusquant.entropy.profile import StoreProfile
from nexusquant.errors import ConfigError, FormatError, ProfileError
from nexusquant.math.rope import Frequencies
from nexusquant.vllm.blocks import BlockCodec, Layers, Shape, Shapes, check_meta, dump, load
from nexusquant.vllm.rotary import rotate, rows, unrotate

SINKS = 4
"""First tokens of a sequence: unlike all others, and all queries look at them. Kept as they are."""
LEAST, MOST = 1.0, 12.0


class EntropyCodec(BlockCodec):
    """A block of all layers is one page of `JointCode`, keys without RoPE; sinks are exact.

    Coding is done on CPUs: blocks of another device are copied to it first.

    Args:
        profile: the storage profile of the model, for all its layers and heads.
        rope: of the model (`nexusquant.vllm.rotary.frequencies`).
        bits: 1 to 12 per element of text like the profile's. Other text takes somewhat more.
    """

    name = "entropy"
    version = 1

    def __init__(self, profile: StoreProfile, rope: Frequencies, bits: float = 5.0) -> None:
        if type(bits) not in (int, float) or not LEAST <= bits <= MOST:
            raise ConfigError(f"bits={bits!r}: the codec entropy takes {LEAST:g} to {MOST:g}.")
        self._rope, self._profile = rope, profile
        self._code = JointCode(profile, profile.step_for(bits, torch.zeros(1, dtype=torch.int16)))

    def identity(self) -> dict[str, Any]:
        """Name, version, the profile's digest and the number of the step."""
        return {**super().identity(), "profile": self._profile.digest, "step": self._code.step}

    def encode(self, keys: Layers, values: Layers, first_position: int) -> bytes:
        """The page, and the exact sinks of a sequence's first block.

        Raises:
            ProfileError: a profile of other shapes.
            NonFiniteError: NaN, infinity, or vectors far beyond what the profile knows.
        """
        tokens, dtype = keys[0].shape[1], keys[0].dtype
        shapes = [(tuple(k.shape), tuple(v.shape)) for k, v in zip(keys, values, strict=True)]
        if shapes != self._shapes(tokens):
            raise ProfileError(
                f"the storage profile is of another model: it has {len(self._profile.shapes)}"
                f" layers, the first {self._shapes(tokens)[0]}, the cache {len(shapes)},"
                f" {shapes[0]}."
            )
        sinks = _sinks(first_position, tokens)
        exact = torch.cat([x[:, :sinks].flatten() for x in (*keys, *values)])
        keys, values = ([x[:, sinks:].cpu() for x in side] for side in (keys, values))
        page = b""
        if sinks < tokens:
            turn = self._rows(first_position, sinks, tokens)
            page = self._code.encode([unrotate(x, *turn) for x in keys], values)
        meta = {**self._about(first_position, tokens), "dtype": str(dtype).removeprefix("torch.")}
        return nxq.pack(meta, {"page": [page], "sinks": [dump(exact)]})

    def decode(
        self, blob: bytes, first_position: int, shapes: Shapes, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values within the step's distortion."""
        tokens = shapes[0][0][1]
        sinks = _sinks(first_position, tokens)
        if list(shapes) != self._shapes(tokens):
            raise FormatError("other shapes than the storage profile's were asked for.")
        sides = list(zip(*shapes, strict=True))
        with nxq.Reader.open(blob) as reader:
            dtype = check_meta(reader.meta, self._about(first_position, tokens))
            counts = [heads * sinks * dim for side in sides for heads, _, dim in side]
            exact = iter(load(reader.read("sinks", 0), dtype, [sum(counts)]).split(counts))
            coded: tuple[list[Tensor], list[Tensor]] | None = None
            if sinks < tokens:
                keys, values = self._code.decode(reader.read("page", 0), tokens - sinks)
                turn = self._rows(first_position, sinks, tokens)
                coded = [rotate(x, *turn) for x in keys], values
        found: list[list[Tensor]] = []
        for number, side in enumerate(sides):
            first = [next(exact).view(heads, sinks, dim) for heads, _, dim in side]
            rest = coded[number] if coded else [x[:, sinks:] for x in first]
            both = zip(first, rest, strict=True)
            found.append([torch.cat([a.to(like.dtype), b.to(like.dtype)], 1) for a, b in both])
        keys, values = ([x.to(like.device) for x in side] for side in found)
        return keys, values

    def _about(self, first_position: int, tokens: int) -> dict[str, Any]:
        """What the header says; the shapes of layers are the profile's."""
        return {"codec": self.identity(), "first_position": first_position, "tokens": tokens}

    def _shapes(self, tokens: int) -> list[tuple[Shape, Shape]]:
        """Of a block's keys and values, layer by layer."""
        known = (self._profile.shapes[layer] for layer in sorted(self._profile.shapes))
        return [((heads, tokens, key), (heads, tokens, value)) for heads, key, value in known]

    def _rows(self, first_position: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return rows(self._rope, torch.arange(first_position + start, first_position + stop))


def _sinks(first_position: int, tokens: int) -> int:
    """How many first tokens of a block are sinks."""
    return min(max(SINKS - first_position, 0), tokens)
