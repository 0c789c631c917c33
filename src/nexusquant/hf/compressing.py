"""What a compact layer does with its tail: when it is compressed, by which settings and profile."""

from __future__ import annotations

from dataclasses import replace

import torch

from nexusquant.compressor import Chunk, compress
from nexusquant.config import CompressionConfig
from nexusquant.frame import KeyFrame
from nexusquant.hf.notices import Notices
from nexusquant.hf.precision import own_arithmetic
from nexusquant.hf.profiles import FIRST_PROMPT, ProfileBook
from nexusquant.hf.rope_tables import LayerRope
from nexusquant.hf.tail import Call, Tail
from nexusquant.profile import Profile
from nexusquant.provisional import MOST_BITS, final, provisional
from nexusquant.retention import retain
from nexusquant.stored import Stored

UNSEEN_BITS = 4
"""Least bits per element where no queries tell what matters."""


class Compressing:
    """The part of a compact layer that turns its tail into stored tokens."""

    config: CompressionConfig
    layer_idx: int
    notices: Notices
    profiles: ProfileBook | None
    rope: LayerRope | None
    device: torch.device
    stored: Stored
    tail: Tail | None
    length: int
    exact: bool
    reached: bool
    read: bool
    waiting: Call | None
    provisional: CompressionConfig | None

    @property
    def planned(self) -> CompressionConfig:
        """The config that its first tokens are coded with, which later ones follow."""
        if self.reached and not self.read:
            return self.config
        whole = self.config.replace(evict_ratio=0.0, max_tokens=None)
        if self.reached:
            return whole
        bits = {name: max(getattr(whole, name), UNSEEN_BITS) for name in ("key_bits", "value_bits")}
        return whole.replace(tiers=(), fresh_length=0, **bits)

    @property
    def block(self) -> int:
        """Tokens that are compressed at a time; the first decide how all others are coded."""
        first = self.config.codec == "e8" and not self.stored.body
        return self.config.least_scored if first else self.config.residual_length

    def frame(self) -> KeyFrame:
        """Coordinates that this layer's keys are coded in, with this forward's rows."""
        return self.rope.frame(self.config.rope_page) if self.rope else KeyFrame(None, 0)

    def _held(self, call: Call) -> tuple[Tail | None, Call]:
        """What of the tail may be compressed, and the call as over that."""
        return self.tail, call

    def _profile(self, call: Call, chunk: Chunk) -> Profile | None:
        if self.profiles is None:
            return None
        alone = not self.stored.body and 2 * call.query.shape[2] >= self.length
        output = call.output if alone else None
        return self.profiles.obtain(chunk, self.frame(), self.config.sinks, output)

    def _learned(self, call: Call) -> Call:
        """`call` for later, when the residual stream is gone: a profile is built from it now."""
        tail, held = self._held(call)
        if tail is not None and held.fills(tail, self.block) and not self.exact:
            self._profile(held, self._chunk(held, tail))
        return replace(call, output=None)

    def _chunk(self, call: Call, tail: Tail) -> Chunk:
        if self.read:
            call = replace(call, valid=None)  # padding, too, must be there to be read
        start = self.length - tail.count
        return call.chunk(tail, start, self.layer_idx, self.config.least_scored)

    def _compress(self, call: Call) -> None:
        tail, config = self.tail, self.config
        if tail is None:
            return
        if self.exact or not call.fills(tail, self.block):
            lossy = config.codec == "e8" and self.stored.body and not self.exact
            self.tail = tail.narrowed() if lossy else tail.owned()
            return
        chunk, frame = self._chunk(call, tail), self.frame()
        profile = self._profile(call, chunk)
        planned = self.planned
        if config.max_tokens is not None and planned.max_tokens is None:
            self.notices.warn(
                "max_tokens does not bound layers whose keys or values this model reads as tensors"
                " (`nexusquant doctor` says which): nothing is evicted there."
            )
        self._store(planned, chunk, frame, profile)
        if planned.max_tokens is not None:
            self.stored = retain(
                self.stored, planned.max_tokens,
                call.query if tail.queries is None else tail.queries, frame=frame,
                scaling=call.scaling, softcap=call.softcap,
                recent_from=self.length - config.recent,
            )  # fmt: skip
        self.tail = tail.emptied()

    def _store(
        self, config: CompressionConfig, chunk: Chunk, frame: KeyFrame, profile: Profile | None
    ) -> None:
        """The chunk behind what is stored; if the profile is its own prompt's, in two steps."""
        own = profile is not None and profile.source == FIRST_PROMPT and not self.stored.body
        few = max(config.key_bits, config.value_bits) <= MOST_BITS
        if profile is None or not (own and few) or chunk.queries is None:
            self.stored = compress(config, self.stored, chunk, frame, profile)
            return
        self.stored = compress(provisional(config), self.stored, chunk, frame, profile.alone())
        self.provisional = config
        if profile.complete:
            self._code_again()

    def _code_again(self) -> None:
        """The profile is complete, or there is none: what was coded provisionally gets its rate."""
        config, self.provisional = self.provisional, None
        profile = None if self.profiles is None else self.profiles.profile
        if config is not None and (profile is None or profile.complete):
            with own_arithmetic(self.device):
                self.stored = final(config, self.stored, profile)

    def compress_waiting(self) -> None:
        """The second pass is over, or there is none."""
        call, self.waiting = self.waiting, None
        if call is not None:
            with own_arithmetic(self.device):
                self._compress(call)
