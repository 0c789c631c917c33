"""The worker's side: blocks between the paged cache and the store, in threads of their own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from nexusquant.errors import FormatError, NexusQuantError
from nexusquant.vllm.blocks import BlockCodec
from nexusquant.vllm.counters import Counters
from nexusquant.vllm.guard import Guard
from nexusquant.vllm.keys import store_key
from nexusquant.vllm.lanes import beside, mark
from nexusquant.vllm.layouts import Layout
from nexusquant.vllm.planner import Block, Load

_FETCHED = 8  # blocks per question to the store
_GATHERED = 32 << 20  # bytes copied out of the paged cache at a time
_NAP = 0.005  # seconds that an idle engine waits for loads

Gathered = list[tuple[Tensor, Tensor]]
"""Per layer keys and values, (blocks, heads, tokens, dim)."""


@dataclass
class _Loading:
    """A request whose blocks are being loaded."""

    parts: int
    failed: list[Block] = field(default_factory=list)

    def failed_before(self, index: int) -> bool:
        """Whether a block before this one failed, so that vLLM computes this one anyway."""
        return any(block.index < index for block in self.failed)


class Transfer:
    """Loads and saves blocks of one worker.

    Saving copies blocks out of the paged cache at once, so that vLLM may use them again, and
    encodes and stores the copies in threads. Loading fetches, decodes and writes in threads, into
    blocks that vLLM keeps for the request until it is reported.

    Args:
        suffix: of this rank's keys.
        threads, queue_bytes: of `Settings`.
    """

    def __init__(
        self,
        codec: BlockCodec,
        guard: Guard,
        suffix: str,
        block_size: int,
        counters: Counters,
        logger: logging.Logger,
        threads: int,
        queue_bytes: int,
    ) -> None:
        self._codec, self._guard, self._suffix = codec, guard, suffix
        self._block_size, self._counters, self._logger = block_size, counters, logger
        self._queue_bytes = queue_bytes
        self._loaders = ThreadPoolExecutor(threads, thread_name_prefix="nexusquant-load")
        self._savers = ThreadPoolExecutor(threads, thread_name_prefix="nexusquant-save")
        self._changed = threading.Condition()
        self._loading: dict[str, _Loading] = {}
        self._finished: set[str] = set()
        self._failed: set[int] = set()
        self._unsaved: set[bytes] = set()
        self._queued = 0  # bytes
        self._caches: list[Tensor] = []
        self._layouts: list[Layout] = []

    def register(self, caches: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
        """The paged caches of all layers, (blocks, heads, tokens, width), with their layouts.

        A block of noise goes through the codec: kernels are compiled now, and what the codec cannot
        do ends the start instead of requests.
        """
        self._caches, self._layouts = list(caches), list(layouts)
        self._like = caches[0].new_empty(0)
        self._shapes = [(layout.key_shape, layout.value_shape) for layout in layouts]
        self._block_bytes = sum(prod(c.shape[1:]) * c.element_size() for c in caches)
        self._savers.submit(self._try_codec, mark(self._like.device)).result()

    def _try_codec(self, after: torch.cuda.Event | None) -> None:
        """In a thread, as Numba changes the number of threads that PyTorch uses in its own."""
        generator = torch.Generator().manual_seed(0)
        with beside(self._like.device, after):
            keys, values = (
                [torch.randn(shape, generator=generator).to(self._like) for shape in side]
                for side in zip(*self._shapes, strict=True)
            )
            blob = self._codec.encode(keys, values, 0)
            self._codec.decode(blob, 0, self._shapes, self._like)

    def load(self, load: Load) -> None:
        """Begin to load a request's blocks."""
        parts = [
            load.blocks[start : start + _FETCHED] for start in range(0, len(load.blocks), _FETCHED)
        ]
        loading = _Loading(len(parts))
        after = mark(self._like.device)
        with self._changed:
            self._loading[load.request] = loading
        for part in parts:
            self._loaders.submit(self._load, load.request, loading, part, after)

    def save(self, blocks: Sequence[Block]) -> None:
        """Copy blocks and begin to save the copies; wait while too many are waiting already."""
        count = max(1, min(_GATHERED, self._queue_bytes) // self._block_bytes)
        for start in range(0, len(blocks), count):
            some = blocks[start : start + count]
            size = len(some) * self._block_bytes
            self._take_room(size)
            ids = torch.tensor([block.id for block in some], device=self._like.device)
            gathered = [
                layout.read(cache, ids)
                for layout, cache in zip(self._layouts, self._caches, strict=True)
            ]
            self._savers.submit(self._save, some, gathered, mark(self._like.device), size)

    def _take_room(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._queued or self._queued + size <= self._queue_bytes
            )
            self._queued += size

    def flush(self) -> None:
        """Wait until everything that was to be saved is, or failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queued)

    def finished(self, idle: bool) -> tuple[set[str], set[int]]:
        """Requests whose loads are over since the last call, and blocks that failed for them.

        Args:
            idle: the engine has nothing else to do; wait a moment for one.
        """
        with self._changed:
            if idle and self._loading and not self._finished:
                self._changed.wait(_NAP)
            finished, self._finished = self._finished, set()
            failed, self._failed = self._failed, set()
        return finished, failed

    def unsaved(self) -> set[bytes]:
        """Blocks that the store did not take since the last call."""
        with self._changed:
            unsaved, self._unsaved = self._unsaved, set()
        return unsaved

    def close(self) -> None:
        """Finish what is being saved; loads that have not begun are dropped."""
        self._loaders.shutdown(cancel_futures=True)
        self._savers.shutdown()
        self._guard.close()

    def _load(
        self,
        request: str,
        loading: _Loading,
        blocks: list[Block],
        after: torch.cuda.Event | None,
    ) -> None:
        started, good = time.perf_counter(), 0
        try:
            if not loading.failed_before(blocks[0].index):
                with beside(self._like.device, after):
                    good = self._fetch(blocks)
        # A request that is never reported waits for ever: whatever went wrong, its blocks are
        # reported as failed, and the trace is shown.
        except Exception:
            self._logger.exception("Loading KV blocks failed; they are computed again.")
        self._counters.add(
            loaded_blocks=good,
            failed_blocks=len(blocks) - good,
            load_seconds=time.perf_counter() - started,
        )
        with self._changed:
            loading.failed.extend(blocks[good:])
            loading.parts -= 1
            if not loading.parts:
                del self._loading[request]
                self._finished.add(request)
                self._failed.update(block.id for block in loading.failed)
                self._changed.notify_all()

    def _fetch(self, blocks: list[Block]) -> int:
        """Write blocks into the cache up to the first that cannot be had; how many."""
        keys = [store_key(block.digest, self._suffix) for block in blocks]
        decoded: list[Gathered] = []
        for block, key, blob in zip(blocks, keys, self._guard.get_many(keys), strict=True):
            if blob is None:
                break
            try:
                sides = self._codec.decode(
                    blob, block.index * self._block_size, self._shapes, self._like
                )
            except FormatError as error:
                self._counters.add(damaged_blocks=1)
                self._logger.warning("KV block %s is damaged: %s", key, error)
                self._guard.delete(key)  # or it would pass for stored
                break
            decoded.append(list(zip(*sides, strict=True)))
            self._counters.add(loaded_bytes=len(blob))
        if decoded:
            ids = torch.tensor([block.id for block in blocks], device=self._like.device)
            for layer, (layout, cache) in enumerate(zip(self._layouts, self._caches, strict=True)):
                k = torch.stack([sides[layer][0] for sides in decoded])
                v = torch.stack([sides[layer][1] for sides in decoded])
                layout.write(cache, ids[: len(decoded)], k, v)
        return len(decoded)

    def _save(
        self,
        blocks: Sequence[Block],
        gathered: Gathered,
        after: torch.cuda.Event | None,
        size: int,
    ) -> None:
        started, done, unsaved = time.perf_counter(), 0, []
        try:
            with beside(self._like.device, after):
                names = [store_key(block.digest, self._suffix) for block in blocks]
                there = self._guard.contains_many(names)  # from another server, or earlier
                for number, block in enumerate(blocks):
                    layers = [(keys[number], values[number]) for keys, values in gathered]
                    if not there[number] and not self._store(block, layers):
                        unsaved.append(block.digest)
                    done += 1
        # What is not saved is a miss, and nobody asks for the result of this thread; the queue must
        # get its room back, and the scheduler must not take the blocks for stored.
        except Exception:
            self._logger.exception("Saving KV blocks failed; they will be misses.")
            self._counters.add(unsaved_blocks=len(blocks) - done)
            unsaved.extend(block.digest for block in blocks[done:])
        self._counters.add(save_seconds=time.perf_counter() - started)
        with self._changed:
            self._unsaved.update(unsaved)
            self._queued -= size
            self._changed.notify_all()

    def _store(self, block: Block, layers: Gathered) -> bool:
        """Encode and store a block; False if the store did not take it."""
        if self._guard.resting():
            self._counters.add(unsaved_blocks=1)
            return False
        key = store_key(block.digest, self._suffix)
        try:
            blob = self._codec.encode(
                [keys for keys, _ in layers],
                [values for _, values in layers],
                block.index * self._block_size,
            )
        except NexusQuantError as error:  # NaN, say, which will be there the next time, too
            self._logger.warning("KV block %s cannot be encoded: %s", key, error)
            self._counters.add(unsaved_blocks=1)
            return True
        if not self._guard.put(key, blob):
            self._counters.add(unsaved_blocks=1)
            return False
        self._counters.add(saved_blocks=1, saved_bytes=len(blob), saved_raw_bytes=self._block_bytes)
        return True
