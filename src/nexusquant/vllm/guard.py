"""A store whose failures are misses: one timeout per outage, not one per request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from nexusquant.errors import StoreError
from nexusquant.stores import Store
from nexusquant.vllm.counters import Counters

Answer = TypeVar("Answer")


class Guard:
    """A store behind a circuit breaker.

    After a failure nothing is asked for `retry_after` seconds, then by one caller: if it gets an
    answer, everybody asks again. An outage is logged when it begins and when it ends. Safe for
    threads, as stores are.

    Args:
        open_store: opens the store; called again while that fails.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        counters: Counters,
        logger: logging.Logger,
        retry_after: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = open_store
        self._counters, self._logger = counters, logger
        self._retry_after, self._clock = retry_after, clock
        self._lock = threading.Lock()
        self._down_until: float | None = None
        self._store: Store | None = None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Which keys have values; none while the store is down."""
        return self._ask(lambda store: store.contains_many(keys), [False] * len(keys))

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values; None for what is missing, and for all while the store is down."""
        return self._ask(lambda store: store.get_many(keys), [None] * len(keys))

    def put(self, key: str, data: bytes) -> bool:
        """Store a value; whether that was possible."""

        def put(store: Store) -> bool:
            store.put(key, data)
            return True

        return self._ask(put, False)

    def delete(self, key: str) -> None:
        """Remove a value, if that is possible."""
        self._ask(lambda store: store.delete(key), None)

    def resting(self) -> bool:
        """Whether a question would not be asked now."""
        with self._lock:
            return self._down_until is not None and self._clock() < self._down_until

    def close(self) -> None:
        """Close the store."""
        with self._lock:
            if self._store is not None:
                self._store.close()

    def _ask(self, question: Callable[[Store], Answer], otherwise: Answer) -> Answer:
        if not self._may_ask():
            return otherwise
        try:
            answer = question(self._opened())
        except StoreError as error:
            self._failed(error)
            return otherwise
        self._answered()
        return answer

    def _opened(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = self._open()
            return self._store

    def _may_ask(self) -> bool:
        """Whether the store is up, or this caller is the one to see whether it is again."""
        with self._lock:
            if self._down_until is None:
                return True
            now = self._clock()
            if now < self._down_until:
                return False
            self._down_until = now + self._retry_after
            return True

    def _failed(self, error: StoreError) -> None:
        self._counters.add(store_errors=1)
        with self._lock:
            began = self._down_until is None
            self._down_until = self._clock() + self._retry_after
        if began:
            self._logger.warning(
                "The store of KV blocks does not answer: %s. Until it does, its blocks are misses;"
                " it is asked again every %g s.",
                error,
                self._retry_after,
            )

    def _answered(self) -> None:
        with self._lock:
            ended = self._down_until is not None
            self._down_until = None
        if ended:
            self._logger.warning("The store of KV blocks answers again.")
