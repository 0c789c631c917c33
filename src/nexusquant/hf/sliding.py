"""The sliding-window variant of `CompactLayer`."""

from __future__ import annotations

import math
from dataclasses import replace

from nexusquant.config import MAX_BITS, CompressionConfig
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.tail import Call, Tail


class CompactSlidingLayer(CompactLayer):
    """A sliding-window layer: coded without eviction; tokens that left the window are dropped.

    Args:
        sliding_window: tokens a query sees, its own included.
        mixed: the model has full-attention layers, too.
    """

    is_sliding = True

    def __init__(
        self,
        config: CompressionConfig,
        layer_idx: int,
        notices: Notices,
        sliding_window: int,
        mixed: bool = False,
    ) -> None:
        self.sliding_window, self.mixed = sliding_window, mixed
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

    @property
    def planned(self) -> CompressionConfig:
        """With more bits where others hold more tokens: the same damage for fewer bytes.

        What a bit buys is 4^-bits, what it costs the tokens held, so the best rates differ by
        log2(tokens held there / here) / 2; in quarters, as every rate has its own allocation.
        """
        config = super().planned
        if not self.mixed or self.stored.body:
            return config
        more = round(2 * math.log2(max(self.length / self.sliding_window, 1))) / 4
        return config.replace(
            key_bits=min(config.key_bits + more, MAX_BITS),
            value_bits=min(config.value_bits + more, MAX_BITS),
        )

    def _held(self, call: Call) -> tuple[Tail | None, Call]:
        surplus = self.first_visible - self.tail_start
        if self.tail is None or surplus <= 0:
            return self.tail, call
        valid = None if call.valid is None else call.valid[:, surplus:]
        received = None if call.received is None else call.received[..., surplus:]
        return self.tail.without_first(surplus), replace(call, valid=valid, received=received)

    def _compress(self, call: Call) -> None:
        self.stored = self.stored.drop_before(self.first_visible)
        self.tail, held = self._held(call)
        super()._compress(held)
