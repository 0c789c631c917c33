"""One layer's keys and values to coded pages, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.entropy.lattice import NOISE, Steps, quantize, reconstruct
from nexusquant.entropy.profile import OCTAVE, StoreProfile, StoreSide
from nexusquant.entropy.symbols import Classes, classify, decode, encode
from nexusquant.errors import FormatError, NonFiniteError, ProfileError
from nexusquant.math.e8 import GROUP

PAGE = 256
"""Tokens of a page, each of which can be read alone."""
_QUIET = -2 * OCTAVE
"""Groups whose deviation is below a quarter of the step: nearly all of their points would be 0."""


@dataclass(frozen=True)
class LayerCode:
    """How one layer is coded at one step.

    Attributes:
        profile: of the model.
        layer: its index.
        step: number of the step, in `OCTAVE`s.
    """

    profile: StoreProfile
    layer: int
    step: int

    @property
    def sides(self) -> tuple[StoreSide, StoreSide]:
        """Keys and values."""
        return self.profile.layers[self.layer]

    def encode(
        self, keys: Tensor, values: Tensor, extra: Tensor | None = None, page: int = PAGE
    ) -> list[bytes]:
        """Keys (without RoPE) and values, (kv_heads, tokens, dim), to pages of `page` tokens.

        Args:
            extra: (tokens,) int16, added to the step number of each token.

        Raises:
            NonFiniteError: NaN, infinity, or vectors far beyond what the profile knows.
            ProfileError: a profile of other shapes.
        """
        tables = self.profile.tables
        return [encode(*points, tables) for points in self.points(keys, values, extra, page)]

    def points(
        self, keys: Tensor, values: Tensor, extra: Tensor | None = None, page: int = PAGE
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], Classes]]:
        """What `encode` codes, page by page: n (tokens, groups, 8), coset (tokens, groups)."""
        tokens = keys.shape[1]
        extra = torch.zeros(tokens, dtype=torch.int16) if extra is None else extra
        paged = _paged(extra[:, None], page)[..., 0]
        found = [
            quantize(_paged(self._enter(side, x), page), self._steps(side, paged))
            for side, x in zip(self.sides, (keys, values), strict=True)
        ]
        for i in range(len(paged)):
            count = min(page, tokens - i * page)
            n, coset = (torch.cat([side[k][i, :count] for side in found], -1) for k in (0, 1))
            points = n.numpy().reshape(count, -1, GROUP)
            yield points, coset.numpy().astype(np.int32), self.classes(paged[i, :count])

    def decode(
        self, pages: list[bytes | memoryview], counts: list[int], extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of consecutive pages with `counts` tokens, as given to `encode`.

        Raises:
            FormatError: damaged pages.
        """
        heads, *dims = self.profile.shapes[self.layer]
        page = max(counts)
        real = torch.arange(page) < torch.tensor(counts)[:, None]
        paged = torch.zeros(real.shape, dtype=torch.int16)
        if extra is not None:
            paged[real] = extra
        widths = [self._coded(side) for side in self.sides]
        n = torch.zeros(len(pages), page, sum(widths), dtype=torch.int32)
        coset = torch.zeros(len(pages), page, sum(widths) // GROUP, dtype=torch.int32)
        for i, (data, count) in enumerate(zip(pages, counts, strict=True)):
            points, cosets = decode(data, self.classes(paged[i, :count]), self.profile.tables)
            n[i, :count] = torch.from_numpy(points.reshape(count, -1))
            coset[i, :count] = torch.from_numpy(cosets)
        out = []
        for side, dim, part, bits in zip(
            self.sides, dims, n.split(widths, -1),
            coset.split([w // GROUP for w in widths], -1), strict=True,
        ):  # fmt: skip
            y = reconstruct(part, bits, self._steps(side, paged))[real]
            x = y @ side.inverse[:, : y.shape[1]].T + side.mean
            if not bool(torch.isfinite(x).all()):
                raise FormatError(f"layer {self.layer} decodes to NaN or infinity: damaged.")
            out.append(x.unflatten(-1, (heads, dim)).transpose(0, 1))
        return out[0], out[1]

    def _enter(self, side: StoreSide, x: Tensor) -> Tensor:
        """(kv_heads, tokens, dim) to the coded coordinates (tokens, coded)."""
        wide = x.detach().float().cpu().transpose(0, 1).flatten(1)
        if wide.shape[1] != len(side.mean):
            raise ProfileError(
                f"the storage profile has {len(side.mean)} dimensions in layer {self.layer}, the"
                f" cache has {wide.shape[1]}: it is another model's."
            )
        if not bool(torch.isfinite(wide).all()):
            raise NonFiniteError(f"NaN or infinity in layer {self.layer}.")
        return (wide - side.mean) @ side.matrix[: self._coded(side)].T

    def _coded(self, side: StoreSide) -> int:
        """Leading coordinates that are coded; the others stay at their mean."""
        loud = (side.group.amax(0) - self.step >= _QUIET).nonzero()
        return (int(loud[-1]) + 1) * GROUP if len(loud) else 0

    def _steps(self, side: StoreSide, extra: Tensor) -> Steps:
        """Of pages whose tokens have `extra` (pages, tokens)."""
        coded = self._coded(side)
        size = torch.exp2((extra[..., None].float() + self.step) / OCTAVE)
        level = side.level[_which(extra.shape[1]), :coded].float()
        variance = torch.exp2(2 * level / OCTAVE)
        shrink = variance / (variance + NOISE * size.square())
        return Steps(size, shrink, side.decay[:coded].float())

    def classes(self, extra: Tensor) -> Classes:
        """Of a page whose tokens have `extra`."""
        widths = [self._coded(side) for side in self.sides]

        def levels(name: str, size: int) -> NDArray[np.int32]:
            parts = [
                getattr(side, name)[:, : width // size]
                for side, width in zip(self.sides, widths, strict=True)
            ]
            level = torch.cat(parts, -1)[_which(len(extra))].int()
            return (level - self.step - extra[:, None].int()).numpy()

        value, drop = classify(levels("level", 1))
        coset, _ = classify(levels("group", GROUP))
        groups = [width // GROUP for width in widths]
        shape = (len(extra), sum(groups), GROUP)
        side = np.repeat(np.arange(2, dtype=np.int16), groups)
        return Classes(side, coset, value.reshape(shape), drop.reshape(shape))


def _which(tokens: int) -> list[int]:
    """Row of the levels that every token of a page has."""
    return [0] + [1] * (tokens - 1)


def _paged(x: Tensor, page: int) -> Tensor:
    """(tokens, n) to (pages, page, n), with zeros behind."""
    pages = -(-len(x) // page)
    return torch.cat([x, x.new_zeros(pages * page - len(x), x.shape[1])]).view(
        pages, page, x.shape[1]
    )
