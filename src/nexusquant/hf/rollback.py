"""Taking tokens back: `crop`, and recording for drafts that may be refused."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from nexusquant.errors import UnsupportedError
from nexusquant.hf.precision import own_arithmetic
from nexusquant.hf.rope_tables import LayerRope
from nexusquant.hf.tail import Call, Tail
from nexusquant.stored import Stored


class Rollback(ABC):
    """The part of a compact layer that removes tokens from its end."""

    device: torch.device
    layer_idx: int
    length: int
    is_initialized: bool
    record_past: bool
    deferred: Call | None
    stored: Stored
    tail: Tail | None
    rope: LayerRope | None

    @abstractmethod
    def _compress(self, call: Call) -> None:
        """Code the tail as far as `call` is about it."""

    @property
    def is_croppable(self) -> bool:
        """Always, as far as `check_crop` lets it."""
        return True

    def take_back(self, count: int) -> None:
        """Remove the last `count` tokens, of the tail and fresh ones before it."""
        if count and self.tail is not None:
            coded = max(count - self.tail.count, 0)
            self.tail = self.tail.without_last(count - coded)
            self.length -= count
            if coded:
                self.stored = self.stored.before(self.length)
            if self.rope is not None:
                self.rope.truncate(self.length)

    def activate_past_recording(self) -> None:
        """Compress only after `crop` said which tokens stay."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """No rollback will come: compress what waited for one."""
        self.record_past = False
        self._compress_deferred(0)

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` removes from the end.

        Raises:
            UnsupportedError: more tokens than are uncoded or fresh.
        """
        if not self.is_initialized:
            return 0
        count = self.length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        coded = self.length - (0 if self.tail is None else self.tail.count)
        have = self.length - self.stored.fresh_from(coded)
        if count > have:
            raise UnsupportedError(
                f"cannot remove {count} tokens from layer {self.layer_idx}: only the last {have}"
                " are not in their final code. Call activate_past_recording() before adding them."
            )
        return max(count, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens for n <= 0; keep the first n for n > 0 (early 5.x).

        Raises:
            UnsupportedError: more tokens than are uncoded or fresh.
        """
        count = self.check_crop(tokens_to_remove)
        self.take_back(count)
        self._compress_deferred(count)

    def _compress_deferred(self, removed: int) -> None:
        call, self.deferred = self.deferred, None
        if call is not None:
            with own_arithmetic(self.device):
                self._compress(call.without_last(removed))
