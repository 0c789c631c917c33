"""What transformers is told about a compact layer: sizes as if nothing were compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nexusquant.hf.handle import KVHandle
from nexusquant.hf.snapshot import Snapshot
from nexusquant.hf.tail import Tail
from nexusquant.hf.uncompiled import uncompiled


class LogicalSizes(ABC):
    """The part of a compact layer that positions and masks are built from."""

    length: int
    is_initialized: bool
    tail: Tail | None

    @abstractmethod
    def _snapshot(self, tail: Tail, new: int, first_column: int) -> Snapshot:
        """The layer with `tail`, of which `new` tokens are of this call."""

    @uncompiled
    def get_seq_length(self) -> int:
        """Logical length: positions and masks are built from it."""
        return self.length

    @uncompiled
    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns, first column) of the attention mask: columns are slots."""
        first = self.first_visible  # early 5.x passes the positions instead of their number:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length - first + new, first

    @property
    def first_visible(self) -> int:
        """First slot that the next query can see."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early 5.x

    @property
    def tail_start(self) -> int:
        """Slot of the first uncoded tail token."""
        return self.length - (0 if self.tail is None else self.tail.count)

    # Readers of layer.keys (debuggers, cross-attention) get a lazy handle.
    keys = property(lambda self: self._peek(0), lambda self, value: None)
    values = property(lambda self: self._peek(1), lambda self, value: None)

    def _peek(self, which: int) -> Tensor | None:
        if not getattr(self, "is_initialized", False) or self.tail is None:
            return None
        return KVHandle(self._snapshot(self.tail, 0, self.first_visible), which)
