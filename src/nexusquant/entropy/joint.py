"""All layers of a few tokens as one page.

The range coder takes a call per kind of number. Where pages are short, calls are what takes time,
and all layers together need hardly more of them than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nexusquant.entropy.classes import Classes
from nexusquant.entropy.layer import LayerCode
from nexusquant.entropy.profile import StoreProfile
from nexusquant.entropy.symbols import decode, encode
from nexusquant.errors import ProfileError


@dataclass(frozen=True)
class JointCode:
    """How all layers of a profile, ascending, are coded at one step.

    Attributes:
        profile: of the model.
        step: number of the step.
    """

    profile: StoreProfile
    step: int

    def encode(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bytes:
        """Keys (without RoPE) and values of each layer, (kv_heads, tokens, dim), as one page.

        Raises:
            NonFiniteError: NaN, infinity, or vectors far beyond what the profile knows.
            ProfileError: a profile of other shapes, or of another number of layers.
        """
        if not len(keys) == len(values) == len(self._codes):
            raise ProfileError(
                f"the storage profile has {len(self._codes)} layers, the cache has {len(keys)}: it"
                " is another model's."
            )
        pages = [
            next(code.points(k, v, page=k.shape[1]))
            for code, k, v in zip(self._codes, keys, values, strict=True)
        ]
        n, coset, _ = zip(*pages, strict=True)
        tokens = keys[0].shape[1]
        return encode(
            np.concatenate(n, 1), np.concatenate(coset, 1), self._classes(tokens),
            self.profile.tables,
        )  # fmt: skip

    def decode(self, data: bytes | memoryview, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of all layers, as given to `encode`, fp32.

        Raises:
            FormatError: damaged.
        """
        n, coset = decode(data, self._classes(tokens), self.profile.tables)
        ends = np.cumsum([code.classes(_none(0)).shape[1] for code in self._codes])[:-1]
        parts = zip(self._codes, np.split(n, ends, 1), np.split(coset, ends, 1), strict=True)
        keys, values = zip(*(code.vectors(*points) for code, *points in parts), strict=True)
        return list(keys), list(values)

    @cached_property
    def _codes(self) -> list[LayerCode]:
        return [LayerCode(self.profile, i, self.step) for i in sorted(self.profile.layers)]

    def _classes(self, tokens: int) -> Classes:
        """Of all groups of all layers, in a row."""
        known = [code.classes(_none(tokens)) for code in self._codes]
        side, group, value = (
            np.concatenate([getattr(one, name) for one in known], axis)
            for name, axis in (("side", 0), ("group", 1), ("value", 1))
        )
        return Classes(side, group, value, known[0].extra)


def _none(tokens: int) -> Tensor:
    """No `extra`."""
    return torch.zeros(tokens, dtype=torch.int16)
