"""The storage codec's loops on tensors and arrays (`nexusquant.kernels.storage.Storage`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.kernels.cpu import lattice, symbols

_GROUP = 8


class Loops:
    """See `nexusquant.kernels.storage.Storage`. One thread each; they may run beside each other."""

    def quantize(
        self, y: Tensor, size: Tensor, variance: Tensor, decay: Tensor, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Points of pages y (pages, tokens, dim) fp32."""
        pages, tokens, dim = y.shape
        n = torch.empty(y.shape, dtype=torch.int32)
        coset = torch.empty(pages, tokens, dim // _GROUP, dtype=torch.bool)
        held = [x.float().contiguous() for x in (y, size, variance, decay)]
        lattice.quantize(
            pages, tokens, dim, *(x.data_ptr() for x in held), np.float32(noise), n.data_ptr(),
            coset.data_ptr(),
        )  # fmt: skip
        return n, coset

    def reconstruct(self, n: Tensor, coset: Tensor, size: Tensor, decay: Tensor) -> Tensor:
        """Vectors (pages, tokens, dim) fp32 of points."""
        pages, tokens, dim = n.shape
        y = torch.empty(pages * tokens, dim)
        lattice.reconstruct(
            pages, tokens, dim, n.flatten(0, 1).contiguous().numpy(),
            coset.flatten(0, 1).contiguous().numpy(),
            size.float().flatten().numpy(), decay.float().contiguous().numpy(), y.numpy(),
        )  # fmt: skip
        return y.view(n.shape)

    def order(self, key: NDArray[Any], kinds: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Stable order of key (n,), and how often each of 0 to `kinds` - 1 occurs."""
        counts, order = np.zeros(kinds, np.int64), np.empty(len(key), np.int64)
        symbols.order(np.ascontiguousarray(key, np.int16), counts, order)
        return order, counts

    def number_keys(
        self,
        level: NDArray[Any],
        extra: NDArray[Any],
        table: NDArray[Any],
        low: int,
        side: NDArray[Any],
        coset: NDArray[Any],
        parity: NDArray[Any],
        start: int,
        stop: int,
    ) -> NDArray[Any]:
        """Keys of the numbers `start` to `stop` - 1 of every group, flat."""
        key = np.empty(coset.size * (stop - start), np.int16)
        level, extra, side, coset, parity = (
            np.ascontiguousarray(x, np.int32) for x in (level, extra, side, coset, parity)
        )
        symbols.number_keys(level, extra, table, low, side, coset, parity, start, stop, key)
        return key
