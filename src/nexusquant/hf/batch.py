"""The batch operations that transformers asks of a cache layer, in terms of one `map`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class BatchOperations(ABC):
    """Everything that rearranges rows or moves tensors."""

    device: torch.device

    @abstractmethod
    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation to everything held."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch row i becomes row beam_idx[i]."""
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row `repeats` times in a row."""
        self.map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self.map(lambda t: t[indices.to(t.device) if isinstance(indices, Tensor) else indices])

    def offload(self) -> None:
        """Move to the CPU."""
        self.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the first update."""
        self.map(lambda t: t.to(self.device, non_blocking=True))
