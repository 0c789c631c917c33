"""The sliding-window variant of `CompactLayer`."""

from __future__ import annotations

from dataclasses import replace

from nexusquant.config import CompressionConfig
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.tail import Call


class CompactSlidingLayer(CompactLayer):
    """A sliding-window layer: coded without eviction; tokens that left the window are dropped.

    Args:
        sliding_window: tokens a query sees, its own included.
    """

    is_sliding = True

    def __init__(
        self, config: CompressionConfig, layer_idx: int, notices: Notices, sliding_window: int
    ) -> None:
        self.sliding_window = sliding_window
        super().__init__(
            config.replace(evict_ratio=0.0, sinks=0, max_tokens=None), layer_idx, notices
        )

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    get_max_cache_shape = get_max_length

    @property
    def first_visible(self) -> int:
        """First slot that the next query can see."""
        return max(self.length - self.sliding_window + 1, 0)

    def _compress(self, call: Call) -> None:
        first = self.first_visible
        self.stored = self.stored.drop_before(first)
        surplus = first - self.tail_start
        if surplus > 0 and self.tail is not None:
            self.tail = self.tail.without_first(surplus)
            valid = None if call.valid is None else call.valid[:, surplus:]
            received = None if call.received is None else call.received[..., surplus:]
            call = replace(call, valid=valid, received=received)
        super()._compress(call)
