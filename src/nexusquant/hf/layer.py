"""Compact cache layers: codes for the past, a small uncoded tail, sizes reported as logical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from nexusquant.accounting import owned
from nexusquant.compressor import Chunk, Stored, compress
from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.hf.handle import KVHandle, Snapshot
from nexusquant.hf.install import Lease
from nexusquant.hf.notices import Notices
from nexusquant.hf.passes import note_update
from nexusquant.hf.profiles import ProfileBook
from nexusquant.hf.rope_tables import LayerRope, RopeBook, RotaryCall
from nexusquant.math.e8 import GROUP
from nexusquant.math.rope import Frequencies, KeyFrame
from nexusquant.retention import WINDOW, retain
from nexusquant.statistics import OutputSide

_STATE = ("stored", "tail_keys", "tail_values", "tail_queries", "length", "deferred", "rope")


class CompactLayer(CacheLayerMixin):
    """One full-attention layer's cache.

    `update` appends to the tail and returns handles; our attention function calls `absorb` once
    this layer's attention has been computed, and only then are tokens compressed. A layer that is
    never reached by our attention function therefore stays exact.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: CompressionConfig, layer_idx: int, notices: Notices) -> None:
        super().__init__()
        self.config, self.layer_idx, self.notices = config, layer_idx, notices
        self.book: RopeBook | None = None
        self.profiles: ProfileBook | None = None
        self.lease: Lease | None = None
        self.rope: LayerRope | None = None
        self.record_past = False
        self.exact = False
        self.reached = False  # by our attention function
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stored = Stored()
        self.tail_keys: Tensor | None = None
        self.tail_values: Tensor | None = None
        self.tail_queries: Tensor | None = None  # only under max_tokens
        self.length = 0
        self.is_initialized = False
        self.deferred: tuple[Tensor, Tensor | None, float, float | None] | None = None
        if self.rope is not None:
            self.rope.truncate(0)

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs to undo the updates that follow; holds references, no copies."""
        return tuple(getattr(self, name) for name in _STATE)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to an earlier `state`."""
        rope = self.rope
        for name, value in zip(_STATE, state, strict=True):
            setattr(self, name, value)
        if rope is not None:
            rope.truncate(self.length)

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

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append K and V, each (batch, kv_heads, new, dim); returns their handles."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.length and not self.reached:
            self.notices.warn(
                "this model computes attention where it cannot be routed to compressed keys and"
                " values (see docs/ARCHITECTURE.md): such layers stay exact."
            )
        note_update(self, self.lease.model if self.lease is not None else None)
        first_column = self.first_visible
        new = key_states, value_states
        if self.tail_keys is not None and self.tail_values is not None:
            if self.tail_keys.shape[:2] != key_states.shape[:2]:
                held, given = tuple(self.tail_keys.shape[:2]), tuple(key_states.shape[:2])
                raise UnsupportedError(
                    f"layer {self.layer_idx} holds (batch, KV heads) {held} but was given {given};"
                    " start a new cache, or select or repeat rows of this one first."
                )
            new = torch.cat([self.tail_keys, new[0]], -2), torch.cat([self.tail_values, new[1]], -2)
        self.tail_keys, self.tail_values = new[0].detach(), new[1].detach()
        self.length += key_states.shape[-2]
        snapshot = Snapshot(
            self, self.stored, *new, self.tail_start, key_states.shape[-2], first_column
        )
        return KVHandle(snapshot, 0), KVHandle(snapshot, 1)

    def get_seq_length(self) -> int:
        """Logical length: positions and masks are built from it."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns, first column) of the attention mask: columns are slots.

        Early 5.x passes the positions of the queries instead of their number.
        """
        first = self.first_visible
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
    def batch_size(self) -> int:
        """Rows, -1 before the first update."""
        if self.tail_keys is not None:
            return self.tail_keys.shape[0]
        for part in self.stored.parts():
            return part.batch_size
        return -1

    @property
    def tail_start(self) -> int:
        """Slot of the first uncoded tail token."""
        return self.length - (0 if self.tail_keys is None else self.tail_keys.shape[2])

    # Readers of layer.keys (debuggers, cross-attention) get a lazy handle.
    keys = property(lambda self: self._peek(0), lambda self, value: None)
    values = property(lambda self: self._peek(1), lambda self, value: None)

    def _peek(self, which: int) -> Tensor | None:
        if not getattr(self, "is_initialized", False) or self.tail_keys is None:
            return None
        assert self.tail_values is not None
        first = self.first_visible
        snapshot = Snapshot(
            self, self.stored, self.tail_keys, self.tail_values, self.tail_start, 0, first
        )
        return KVHandle(snapshot, which)

    # -- what our attention function asks for

    def frame(self) -> KeyFrame:
        """Coordinates that this layer's keys are coded in, with this forward's rows."""
        return self.rope.frame(self.config.rope_page) if self.rope else KeyFrame(None, 0)

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

    def absorb(
        self,
        query: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        output: Callable[[], OutputSide] | None = None,
    ) -> None:
        """This layer's attention is done: compress the tail if it is long enough.

        Args:
            query: (batch, query_heads, q_len, dim) post-RoPE, of the last q_len tail tokens.
            valid: (batch, tail) bool, False for padding.
            output: where this attention's output goes; without it no profile is built.
        """
        self.reached = True
        if self.record_past:  # a rollback may come: `crop` compresses
            self.deferred = (query.detach(), valid, scaling, softcap)
            return
        if self.config.max_tokens is not None:
            self._remember_queries(query.detach())
        self._compress(query.detach(), valid, scaling, softcap, output)

    def _remember_queries(self, query: Tensor) -> None:
        """Keep the latest queries: they decide what leaves when there are too many tokens."""
        held = [] if self.tail_queries is None else [self.tail_queries]
        self.tail_queries = torch.cat([*held, query], 2)[:, :, -WINDOW:].clone()

    def _compress(
        self,
        query: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        output: Callable[[], OutputSide] | None = None,
    ) -> None:
        if self.tail_keys is None or self.tail_values is None:
            return
        if self.exact or self.tail_keys.shape[2] < self.config.residual_length:
            self.tail_keys, self.tail_values = owned(self.tail_keys), owned(self.tail_values)
            return
        chunk = Chunk(
            self.tail_keys, self.tail_values, self.tail_start, valid,
            query[:, :, -self.tail_keys.shape[2] :]
            if query.shape[2] >= self.config.residual_length
            else None,
            scaling, softcap, self.layer_idx,
        )  # fmt: skip
        frame, profile = self.frame(), None
        if self.profiles is not None and not self.stored.body:
            profile = self.profiles.obtain(chunk, frame, self.config.sinks, output)
        self.stored = compress(self.config, self.stored, chunk, frame, profile)
        if self.config.max_tokens is not None:
            latest = query if self.tail_queries is None else self.tail_queries
            self.stored = retain(
                self.stored, self.config.max_tokens, latest, frame=frame, scaling=scaling,
                softcap=softcap, recent_from=self.length - self.config.recent,
            )  # fmt: skip
        # Fresh empty tensors: a view would keep the whole prompt's storage alive.
        self.tail_keys = torch.empty_like(self.tail_keys[:, :, :0])
        self.tail_values = torch.empty_like(self.tail_values[:, :, :0])

    @property
    def elements(self) -> int:
        """Elements of K and V that an uncompressed layer would hold now."""
        if self.tail_keys is None or self.tail_values is None:
            return 0
        tokens = self.length - self.first_visible
        shapes = (self.tail_keys.shape, self.tail_values.shape)
        return tokens * sum(b * h * d for b, h, _, d in shapes)

    def tensors(self) -> list[Any]:
        """Everything that holds storage, for accounting."""
        spans = self.rope.table.spans if self.rope else None
        tail = [self.tail_keys, self.tail_values, self.tail_queries]
        return [self.stored, tail, spans, self.deferred]

    # -- batch operations, rollback, offload

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        batch = self.batch_size
        if batch < 0:
            return
        self.stored = self.stored.map(fn)
        if self.tail_keys is not None and self.tail_values is not None:
            self.tail_keys, self.tail_values = fn(self.tail_keys), fn(self.tail_values)
        if self.tail_queries is not None:
            self.tail_queries = fn(self.tail_queries)
        if self.rope is not None:
            self.rope.map(fn, batch)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch row i becomes row beam_idx[i]."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row `repeats` times in a row."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._map(lambda t: t[indices.to(t.device) if isinstance(indices, Tensor) else indices])

    def activate_past_recording(self) -> None:
        """Compress only after `crop` said which tokens stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens for n <= 0; keep the first n for n > 0 (early 5.x).

        Raises:
            UnsupportedError: more tokens than are uncoded.
        """
        count = self.length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count > 0 and self.is_initialized:
            have = 0 if self.tail_keys is None else self.tail_keys.shape[2]
            if count > have:
                raise UnsupportedError(
                    f"cannot remove {count} tokens from layer {self.layer_idx}: only the last"
                    f" {have} are uncompressed. Call activate_past_recording() before adding them."
                )
            assert self.tail_keys is not None
            assert self.tail_values is not None
            self.tail_keys = self.tail_keys[:, :, : have - count]
            self.tail_values = self.tail_values[:, :, : have - count]
            self.length -= count
        if self.deferred is not None:
            query, valid, scaling, softcap = self.deferred
            self.deferred = None
            if count:
                query = query[:, :, : max(query.shape[2] - count, 0)]
                valid = None if valid is None else valid[:, : valid.shape[1] - count]
            self._compress(query, valid, scaling, softcap)

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the first update."""
        self._map(lambda t: t.to(self.device, non_blocking=True))
