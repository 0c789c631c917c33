"""The sliding-window variant of `CompactLayer`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nexusquant.config import MAX_BITS, CompressionConfig
from nexusquant.errors import UnsupportedError
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
        self.gone = 0  # slots before this one may have been dropped
        own = config.replace(
            evict_ratio=0.0, sinks=0, max_tokens=None,
            recent=min(config.recent, sliding_window - 1),
            fresh_length=min(config.fresh_length, sliding_window // 4),
        )  # fmt: skip
        super().__init__(own, layer_idx, notices)

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    get_max_cache_shape = get_max_length

    @property
    def first_visible(self) -> int:
        """First slot that the next query can see."""
        return max(self.length - self.sliding_window + 1, 0)

    def reset(self) -> None:
        """Forget everything."""
        self.gone = 0
        super().reset()

    def state(self) -> Any:
        """What `restore` needs to undo the updates that follow."""
        return super().state(), self.gone

    def restore(self, state: Any) -> None:
        """Back to an earlier `state`."""
        super().restore(state[0])
        self.gone = state[1]

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` removes from the end.

        Raises:
            UnsupportedError: more tokens than are uncoded, or what comes into view again is gone.
        """
        count = super().check_crop(tokens_to_remove)
        visible = max(self.length - count - self.sliding_window + 1, 0)
        if count and visible < self.gone:
            raise UnsupportedError(
                f"cannot remove {count} tokens from layer {self.layer_idx}: what had left its"
                " window before them is gone. Call activate_past_recording() before adding them."
            )
        return count

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
        self.gone = self.first_visible
        self.stored = self.stored.drop_before(self.gone)
        self.tail, held = self._held(call)
        super()._compress(held)
