"""One layer's keys and values to coded pages, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.entropy.classes import Classes
from nexusquant.entropy.lattice import Steps, quantize, reconstruct
from nexusquant.entropy.profile import COARSEST, FINEST, OCTAVE, StoreProfile, StoreSide
from nexusquant.entropy.symbols import decode, encode
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

    def __post_init__(self) -> None:
        if self.layer not in self.profile.layers:
            raise ProfileError(f"the storage profile does not know layer {self.layer}.")
        if not FINEST <= self.step <= COARSEST:
            raise FormatError(f"step number {self.step}, not {FINEST} to {COARSEST}: damaged.")

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
        both = zip(self.sides, self._coded, (keys, values), strict=True)
        y = torch.cat([self._enter(*one) for one in both], -1)
        paged = _paged(extra[:, None], page)[..., 0]
        n, coset = (x.numpy() for x in quantize(_paged(y, page), self._steps(paged)))
        for i in range(len(paged)):
            count = min(page, tokens - i * page)
            points = n[i, :count].reshape(count, -1, GROUP)
            yield points, coset[i, :count].astype(np.int32), self.classes(paged[i, :count])

    def decode(
        self, pages: list[bytes | memoryview], counts: list[int], extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of consecutive pages with `counts` tokens, as given to `encode`.

        Raises:
            FormatError: damaged pages.
        """
        if len(pages) != len(counts) or min(counts, default=1) < 1:
            raise FormatError(f"{len(pages)} pages of {counts} tokens: damaged.")
        page = max(counts, default=1)
        real = torch.arange(page) < torch.tensor(counts, dtype=torch.int64)[:, None]
        paged = torch.zeros(real.shape, dtype=torch.int16)
        if extra is not None:
            if len(extra) != sum(counts):
                raise FormatError(f"{len(extra)} steps for {sum(counts)} tokens: damaged.")
            paged[real] = extra
        width = sum(self._coded)
        n = torch.zeros(*real.shape, width, dtype=torch.int32)
        coset = torch.zeros(*real.shape, width // GROUP, dtype=torch.bool)
        for i, (data, count) in enumerate(zip(pages, counts, strict=True)):
            points, bits = decode(data, self.classes(paged[i, :count]), self.profile.tables)
            n[i, :count] = torch.from_numpy(points.reshape(count, -1))
            coset[i, :count] = torch.from_numpy(bits != 0)
        y = reconstruct(n, coset, self._steps(paged))
        return self._split(y.flatten(0, 1) if bool(real.all()) else y[real])

    def vectors(self, n: NDArray[np.int32], coset: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Keys and values of one page of `points`, made without `extra`.

        Raises:
            FormatError: they are infinite.
        """
        tokens = len(n)
        points = torch.from_numpy(n.reshape(1, tokens, -1))
        steps = self._steps(torch.zeros(1, tokens, dtype=torch.int16))
        return self._split(reconstruct(points, torch.from_numpy(coset != 0)[None], steps)[0])

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of coded coordinates (tokens, coded)."""
        heads, *dims = self.profile.shapes[self.layer]
        both = zip(self.sides, dims, y.split(self._coded, -1), strict=True)
        keys, values = (
            self._leave(side, part).unflatten(-1, (heads, dim)).transpose(0, 1)
            for side, dim, part in both
        )
        return keys, values

    def _enter(self, side: StoreSide, coded: int, x: Tensor) -> Tensor:
        """(kv_heads, tokens, dim) to the coded coordinates (tokens, coded)."""
        wide = x.detach().float().cpu().transpose(0, 1).flatten(1)
        if wide.shape[1] != len(side.mean):
            raise ProfileError(
                f"the storage profile has {len(side.mean)} dimensions in layer {self.layer}, the"
                f" cache has {wide.shape[1]}: it is another model's."
            )
        if not math.isfinite(float(wide.sum())):
            raise NonFiniteError(f"NaN or infinity in layer {self.layer}.")
        return (wide - side.mean) @ side.matrix[:coded].T

    def _leave(self, side: StoreSide, y: Tensor) -> Tensor:
        """Inverse of `_enter`, (tokens, dim)."""
        x = torch.addmm(side.mean, y, side.inverse[:, : y.shape[1]].T)
        if not math.isfinite(float(x.sum())):
            raise FormatError(f"layer {self.layer} decodes to NaN or infinity: damaged.")
        return x

    @cached_property
    def _coded(self) -> list[int]:
        """Leading coordinates of keys and values that are coded; the others stay at their mean."""
        loud = [(side.group.amax(0) - self.step >= _QUIET).nonzero() for side in self.sides]
        return [(int(groups[-1]) + 1) * GROUP if len(groups) else 0 for groups in loud]

    def _joint(self, name: str, size: int = 1) -> Tensor:
        """What both sides have of their coded coordinates, or groups of `size`, in a row."""
        both = zip(self.sides, self._coded, strict=True)
        return torch.cat([getattr(side, name)[..., : n // size] for side, n in both], -1)

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor, Classes]:
        """Variances and decays, as in `Steps`, and the classes of tokens without `extra`."""
        level, group = self._joint("level"), self._joint("group", GROUP)
        variance = torch.exp2(2 / OCTAVE * level.float())
        side = np.repeat(np.arange(2, dtype=np.int32), [n // GROUP for n in self._coded])
        value, coset = ((x.int() - self.step).numpy() for x in (level, group))
        classes = Classes(side, coset, value.reshape(2, -1, GROUP), np.zeros(0, np.int32))
        return variance, self._joint("decay").float(), classes

    def _steps(self, extra: Tensor) -> Steps:
        """Of pages whose tokens have `extra` (pages, tokens)."""
        variance, decay, _ = self._known
        return Steps(torch.exp2((extra.float() + self.step) / OCTAVE), variance, decay)

    def classes(self, extra: Tensor) -> Classes:
        """Of a page whose tokens have `extra`."""
        return replace(self._known[2], extra=extra.int().numpy())


def _paged(x: Tensor, page: int) -> Tensor:
    """(tokens, n) to (pages, page, n), with zeros behind."""
    pages = -(-len(x) // page)
    if len(x) < pages * page:
        x = torch.cat([x, x.new_zeros(pages * page - len(x), x.shape[1])])
    return x.view(pages, page, x.shape[1])
