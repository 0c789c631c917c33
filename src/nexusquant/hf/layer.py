"""Compact cache layers: codes for the past, a small uncoded tail, sizes reported as logical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.hf.batch import BatchOperations
from nexusquant.hf.compressing import UNSEEN_BITS, Compressing
from nexusquant.hf.handle import handles
from nexusquant.hf.install import Lease
from nexusquant.hf.logical import LogicalSizes
from nexusquant.hf.notices import Notices
from nexusquant.hf.passes import note_update
from nexusquant.hf.precision import own_arithmetic
from nexusquant.hf.profiles import ProfileBook
from nexusquant.hf.quirks import RotaryCall
from nexusquant.hf.rollback import Rollback
from nexusquant.hf.rope_tables import LayerRope, RopeBook, forget_workspace
from nexusquant.hf.second_pass import note, reads_twice
from nexusquant.hf.snapshot import Snapshot
from nexusquant.hf.tail import Call, Tail
from nexusquant.hf.transformers_private import CacheLayerMixin
from nexusquant.hf.uncompiled import uncompiled
from nexusquant.math.e8 import GROUP
from nexusquant.math.rope import Frequencies
from nexusquant.retention import WINDOW
from nexusquant.stored import Stored

_STATE = ("stored", "tail", "length", "deferred", "waiting", "rope")


class CompactLayer(BatchOperations, Compressing, Rollback, LogicalSizes, CacheLayerMixin):
    """One full-attention layer's cache.

    `update` appends to the tail and returns handles; our attention function calls `absorb` once
    this layer's attention has been computed, and only then are tokens compressed. Tokens whose
    attention nobody showed us are coded at the end of the forward pass, without eviction, and
    decoded whenever the model reads them.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False
    stores_tokens = True

    def __init__(self, config: CompressionConfig, layer_idx: int, notices: Notices) -> None:
        super().__init__()
        self.config, self.layer_idx, self.notices = config, layer_idx, notices
        self.book: RopeBook | None = None
        self.profiles: ProfileBook | None = None
        self.lease: Lease | None = None
        self.rope: LayerRope | None = None
        self.record_past = self.exact = False
        self.reached = False  # its attention was shown to us
        self.read = False  # the model reads keys or values as tensors: none may be missing
        self.pending = False  # attention over the tokens added last has not been shown yet
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stored = Stored()
        self.tail: Tail | None = None
        self.length = 0
        self.is_initialized = False
        self.deferred: Call | None = None
        self.waiting: Call | None = None  # for a second pass over the prompt
        self.provisional: CompressionConfig | None = None  # what to code with once that can be told
        self.repeating = False
        if self.rope is not None:
            self.rope.truncate(0)
        if self.profiles is not None:
            self.profiles.forget()

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs to undo the updates that follow; holds references, no copies."""
        return tuple(getattr(self, name) for name in _STATE)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to an earlier `state`."""
        rope = self.rope
        for name, value in zip(_STATE, state, strict=True):
            setattr(self, name, value)
        self.pending, self.provisional = False, None
        if rope is not None:
            rope.truncate(self.length)

    def end_pass(self, failed: bool) -> None:
        """A forward pass is over: rotary rows were its workspace, a profile is complete or void."""
        if self.rope is not None:
            forget_workspace(self.rope.table)
        if self.profiles is not None:
            self.profiles.end_pass(failed)
        self._code_again()

    # -- what transformers asks for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; layers that cannot be coded stay exact, with one warning."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        dims = {key_states.shape[-1], value_states.shape[-1]}
        if self.config.codec == "e8" and any(dim % GROUP for dim in dims):
            self.exact = True
            self.notices.warn(
                f"head_dim {sorted(dims)} is not a multiple of {GROUP}: such layers stay exact."
            )

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append K and V, each (batch, kv_heads, new, dim); returns their handles."""
        if self.lease is not None and self.lease.detached:
            raise UnsupportedError(
                "this cache was unpickled and belongs to no model: nexusquant.attach(cache, model)"
                " first, or use it inside a nexusquant_evict block."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.absorb_unseen()
        if self.provisional is not None and self.profiles is not None:
            self.profiles.end_pass(failed=False)  # of a call of the inner model: nobody saw its end
            self._code_again()
        note_update(self, self.lease.model if self.lease is not None else None)
        first_column = self.first_visible
        tail = Tail(key_states, value_states)
        if self.tail is not None:
            held, given = tuple(self.tail.keys.shape[:2]), tuple(key_states.shape[:2])
            if held != given:
                raise UnsupportedError(
                    f"layer {self.layer_idx} holds (batch, KV heads) {held} but was given {given};"
                    " start a new cache, or select or repeat rows of this one first."
                )
            tail = self.tail.append(key_states, value_states)
        self.tail = tail.detached()
        self.length += key_states.shape[-2]
        self.pending = True
        snapshot = self._snapshot(tail, key_states.shape[-2], first_column)
        return handles(snapshot, key_states, value_states)

    def _snapshot(self, tail: Tail, new: int, first_column: int) -> Snapshot:
        return Snapshot(
            self, self.stored, tail.keys, tail.values, self.tail_start, new, first_column
        )

    # -- what our attention function asks for

    def record_rotary(
        self,
        call: RotaryCall | None,
        module: nn.Module,
        snapshot: Snapshot,
        candidates: Callable[[], list[Frequencies]],
    ) -> None:
        """Capture the rotary rows of the new tokens: coding and scoring undo them."""
        profiled = self.profiles is not None and self.profiles.wanted
        needless = self.config.codec == "exact" and not self.config.evict_ratio and not profiled
        if self.book is None or self.exact or needless:
            return
        past = snapshot.length - snapshot.new
        head_dim = snapshot.tail_keys.shape[-1]
        self.rope = self.book.record(self.rope, call, module, past, candidates, head_dim)

    def absorb(self, call: Call) -> None:
        """This layer's attention is done: compress the tail if it is long enough."""
        with own_arithmetic(call.query.device):
            self._absorb(call)

    def _absorb(self, call: Call) -> None:
        self.reached, self.pending = True, False
        if self.repeating:
            note(self, call)
            return
        if self.record_past:  # a rollback may come: `crop` compresses
            self.deferred = self._learned(call)
            return
        most = self.config.max_tokens
        if most is not None and self.length + WINDOW > most and self.tail is not None:
            self.tail = self.tail.remember(call.query)
        if not self.exact and reads_twice(self.config, call.query.shape[2]):
            self.waiting = self._learned(call)
            return
        self._compress(call)

    def absorb_unseen(self) -> None:
        """The pass is over and nobody showed us the attention: compress without queries."""
        if not self.pending or self.tail is None:
            return
        self.pending = False
        if self.exact or self.repeating or self.config.codec == "exact":
            return
        call = Call(self.tail.keys[:, :, :0], None, 1.0, None)
        if call.fills(self.tail, self.block) and not self.reached:
            self.notices.warn(
                "this model computes attention where compressed keys and values cannot be used:"
                f" layers are coded at {UNSEEN_BITS} bits or more per element, evict nothing, and"
                " are decoded for every forward pass."
            )
        if self.record_past:
            self.deferred = call
        else:
            with own_arithmetic(self.device):
                self._compress(call)

    def stay_exact(self, reason: str) -> None:
        """Never compress this layer, with one warning; too late if something is compressed."""
        if not self.stored.count and not self.exact:
            self.exact = True
            self.notices.warn(
                f"{reason}, which attention over codes does not implement: such layers stay exact."
            )

    @property
    def elements(self) -> int:
        """Elements of K and V that an uncompressed layer would hold now."""
        if self.tail is None:
            return 0
        tokens = self.length - self.first_visible
        shapes = (self.tail.keys.shape, self.tail.values.shape)
        return tokens * sum(b * h * d for b, h, _, d in shapes)

    def tensors(self) -> list[Any]:
        """Everything that holds storage, for accounting."""
        spans = self.rope.table.spans if self.rope else None
        return [self.stored, self.tail, spans, self.deferred]
