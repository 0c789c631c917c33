"""The scheduler's side: which blocks are loaded and saved in which step. Knows no vLLM types."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

_KNOWN = 1 << 16  # digests remembered
_TRUST = 60.0  # seconds until a block that is in the store may be gone: it is saved anew if so


@dataclass(frozen=True)
class Block:
    """A block of the paged cache and what it holds."""

    id: int
    digest: bytes
    index: int  # in its sequence


@dataclass
class Load:
    """Blocks that a request waits for."""

    request: str
    blocks: list[Block]


@dataclass
class Step:
    """What a worker does in one step of the engine.

    Attributes:
        loads: begun, and reported when they are done.
        saves: blocks that are full when the step's forward pass is over.
        flush: whether all saves have to be in the store before the step is over.
        idle: whether there is no forward pass.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Block] = field(default_factory=list)
    flush: bool = False
    idle: bool = False


class Scheduled(NamedTuple):
    """A request's part in a step.

    Attributes:
        new_blocks: ids of all its blocks if `replaces`, else of those that it got in addition.
        computed: its tokens whose keys and values were there before the step.
        tokens: computed in the step.
    """

    request: str
    new_blocks: Sequence[int]
    replaces: bool
    computed: int
    tokens: int


@dataclass
class _Request:
    digests: list[bytes]  # of the prompt's full blocks
    loadable: int  # blocks: one token at least is left to compute
    prompt_tokens: int
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0  # blocks that were saved or need not be
    lookup: tuple[int, Future[int]] | None = None  # first block asked for
    loading: dict[int, int] = field(default_factory=dict)  # block id to index
    offered: int = 0  # the first block of the last answer


class Planner:
    """Bookkeeping over the requests of one engine.

    Args:
        lookup: begins to ask the store for blocks (`Lookup.start`).
        loads, saves: by role.
        flush: whether a prompt's saves are over when its step is.
        lookup_seconds, retry_seconds: of `Settings`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        block_size: int,
        lookup: Callable[[Sequence[bytes]], Future[int]],
        *,
        loads: bool,
        saves: bool,
        flush: bool,
        lookup_seconds: float,
        retry_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size, self._lookup = block_size, lookup
        self._loads, self._saves, self._flush = loads, saves, flush
        self._wait, self._retry, self._clock = lookup_seconds, retry_seconds, clock
        self._requests: dict[str, _Request] = {}
        self._stored: OrderedDict[bytes, float] = OrderedDict()  # since when
        self._bad: dict[bytes, float] = {}
        self._pending: list[Load] = []

    def add(self, request: str, digests: list[bytes], prompt_tokens: int) -> None:
        """A request that was not known before.

        Args:
            digests: of the prompt's full blocks; none if they are not to be stored or looked up.
        """
        loadable = min(len(digests), max(0, prompt_tokens - 1) // self._size)
        self._requests[request] = _Request(digests, loadable, prompt_tokens)

    def knows(self, request: str) -> bool:
        """Whether it was added and is not over."""
        return request in self._requests

    def matched(self, request: str, computed: int) -> int | None:
        """Tokens beyond the `computed` first that can be loaded; None: ask again later."""
        state = self._requests[request]
        first = computed // self._size
        if not self._loads or computed % self._size or first >= state.loadable:
            return 0
        if state.lookup is None or state.lookup[0] > first:
            state.lookup = first, self._lookup(state.digests[first : state.loadable])
        asked, answer = state.lookup
        if not wait([answer], self._wait).done:
            return None
        found = asked + answer.result()
        self._remember(state.digests[asked:found])
        self.unsaved(state.digests[found : state.loadable])
        now = self._clock()
        for index in range(first, found):
            if self._bad.get(state.digests[index], now) > now:
                found = index
                break
        state.offered = first
        return max(0, found - first) * self._size

    def allocated(self, request: str, block_ids: Sequence[int], external: int) -> None:
        """The request has blocks, `external` tokens of which are to be loaded."""
        state = self._requests[request]
        state.lookup = None
        if not external:
            return
        blocks = [
            Block(block_ids[index], state.digests[index], index)
            for index in range(state.offered, state.offered + external // self._size)
        ]
        state.loading = {block.id: block.index for block in blocks}
        self._pending.append(Load(request, blocks))

    def step(self, scheduled: Iterable[Scheduled]) -> Step:
        """What the workers do in this step."""
        step = Step(loads=self._pending, idle=True)
        self._pending = []
        for part in scheduled:
            step.idle = False
            state = self._requests.get(part.request)
            if state is None or not self._saves:
                continue
            if part.replaces:
                state.block_ids = list(part.new_blocks)
            else:
                state.block_ids.extend(part.new_blocks)
            done = part.computed + part.tokens
            end = min(done // self._size, len(state.digests), len(state.block_ids))
            for index in range(state.saved, end):
                digest = state.digests[index]
                if not self._is_stored(digest):
                    step.saves.append(Block(state.block_ids[index], digest, index))
                    self._bad.pop(digest, None)
                    self._remember([digest])
            state.saved = max(state.saved, end)
            if self._flush and part.computed < state.prompt_tokens <= done:
                step.flush = True
        return step

    def loaded(self, finished: Iterable[str], failed_blocks: Iterable[int]) -> None:
        """What the workers report: requests whose loads are over, blocks that could not be loaded.

        A block that failed is looked for again after a while, and stored anew when it is computed.
        """
        failed = set(failed_blocks)
        retry = self._clock() + self._retry
        for state in self._requests.values() if failed else ():
            for block, index in state.loading.items():
                if block in failed:
                    self._bad[state.digests[index]] = retry
                    self.unsaved([state.digests[index]])
                    state.loadable = min(state.loadable, index)
                    state.saved = min(state.saved, index)
        if failed:
            now = self._clock()
            self._bad = {digest: until for digest, until in self._bad.items() if until > now}
        for request in finished:
            if request in self._requests:
                self._requests[request].loading = {}

    def unsaved(self, digests: Iterable[bytes]) -> None:
        """Blocks that are not in the store: to be saved when they are met again."""
        for digest in digests:
            self._stored.pop(digest, None)

    def finished(self, request: str) -> None:
        """The request is over."""
        self._requests.pop(request, None)

    def _is_stored(self, digest: bytes) -> bool:
        return digest in self._stored and self._clock() < self._stored[digest] + _TRUST

    def _remember(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._stored[digest] = self._clock()
            self._stored.move_to_end(digest)
        while len(self._stored) > _KNOWN:
            self._stored.popitem(last=False)
