"""The batch operations that transformers asks of a cache layer, in terms of one `map`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nexusquant.hf.rope_tables import LayerRope
from nexusquant.hf.tail import Tail
from nexusquant.stored import Stored


class BatchOperations:
    """Everything that rearranges rows or moves tensors."""

    device: torch.device
    stored: Stored
    tail: Tail | None
    rope: LayerRope | None

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first update."""
        if self.tail is not None:
            return self.tail.keys.shape[0]
        return next((part.batch_size for part in self.stored.parts()), -1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation to everything held."""
        batch = self.batch_size
        if batch < 0:
            return
        self.stored = self.stored.map(fn)
        if self.tail is not None:
            self.tail = self.tail.map(fn)
        if self.rope is not None:
            self.rope.map(fn, batch)

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
