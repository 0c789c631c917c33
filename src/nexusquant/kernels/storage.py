"""Compiled loops of the storage codec, if there are any: `nexusquant.entropy` is the definition."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.kernels import operator_for


class Storage(Protocol):
    """What is slow in PyTorch and NumPy."""

    def quantize(
        self, y: Tensor, size: Tensor, variance: Tensor, decay: Tensor, noise: float
    ) -> tuple[Tensor, Tensor]:
        """As `entropy.lattice.quantize`."""

    def reconstruct(self, n: Tensor, coset: Tensor, size: Tensor, decay: Tensor) -> Tensor:
        """As `entropy.lattice.reconstruct`."""

    def order(self, key: NDArray[Any], kinds: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Stable order of key (n,) int16, all below `kinds`, and how often each occurs."""

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
        """As `entropy.classes.Classes.number_keys`."""


def storage() -> Storage | None:
    """With the operator in force on CPUs; None: the definition is all there is."""
    return _loops() if operator_for(torch.device("cpu")).name == "numba" else None


@lru_cache(maxsize=1)
def _loops() -> Storage:
    made: Storage = importlib.import_module("nexusquant.kernels.cpu.storage").Loops()
    return made
