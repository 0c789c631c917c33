"""How many blocks of a prompt the store has, from the first on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from nexusquant.vllm.counters import Counters
from nexusquant.vllm.guard import Guard
from nexusquant.vllm.keys import store_key

_AT_ONCE = 256  # keys per question


class Lookup:
    """Asks in a thread, so that a slow store holds up nobody.

    Args:
        suffixes: of all ranks: a block is there if the parts of all are.
    """

    def __init__(
        self, guard: Guard, suffixes: Sequence[str], counters: Counters, logger: logging.Logger
    ) -> None:
        self._guard, self._suffixes, self._counters = guard, suffixes, counters
        self._logger = logger
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="nexusquant-lookup")

    def start(self, digests: Sequence[bytes]) -> Future[int]:
        """The number of these blocks up to the first that is missing; 0 if the store is down."""
        return self._pool.submit(self._found, list(digests))

    def close(self) -> None:
        """Wait for questions that were asked."""
        self._pool.shutdown(cancel_futures=True)

    def _found(self, digests: list[bytes]) -> int:
        try:
            count = self._count(digests)
        # The answer is taken in vLLM's scheduler, which an exception would end: whatever a store's
        # client raises beyond StoreError is a miss, too, and shown with its trace.
        except Exception:
            self._logger.exception("Looking up KV blocks failed; they are misses.")
            count = 0
        self._counters.add(lookups=1, looked_up_blocks=len(digests), found_blocks=count)
        return count

    def _count(self, digests: list[bytes]) -> int:
        count, step = 0, max(1, _AT_ONCE // len(self._suffixes))
        for start in range(0, len(digests), step):
            some = digests[start : start + step]
            there = self._guard.contains_many(
                [store_key(digest, suffix) for digest in some for suffix in self._suffixes]
            )
            ranks = len(self._suffixes)
            whole = [all(there[i * ranks : (i + 1) * ranks]) for i in range(len(some))]
            count += whole.index(False) if False in whole else len(whole)
            if not all(whole):
                break
        return count
