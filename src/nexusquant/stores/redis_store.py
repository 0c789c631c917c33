"""A Redis server, or one that speaks its protocol, as a store."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores.base import Store, is_key, need
from nexusquant.stores.urls import name_of_redis

if TYPE_CHECKING:
    from redis.client import Pipeline

_LARGEST = 512 * 2**20  # bytes; Redis takes no longer string


class RedisStore(Store):
    """One string per value under `prefix` + key; `SET` replaces it in one step.

    How much the server holds and what it evicts is its own setting (`maxmemory`,
    `maxmemory-policy`). A call that fails on a broken connection is repeated once on a new one, so
    a server that was restarted meanwhile goes unnoticed; one that is away is a `StoreError` at
    once, and the first call after its return works again. Connections are pooled: threads can share
    a store, and a forked process gets connections of its own.

    Args:
        url: `redis://[user:password@]host:port/db`, `rediss://` for TLS, `unix:///path?db=0`, with
            redis-py's options for TLS (`?ssl_ca_certs=FILE`).
        ttl: seconds that a value lives after it was written or read; None: until it is evicted.
        renew: whether reading starts the time anew. Range reads count.
        timeout: seconds to wait for a connection, for any answer and for sending one value.
    """

    def __init__(
        self,
        url: str,
        ttl: int | None = None,
        prefix: str = "nexusquant:",
        *,
        renew: bool = True,
        timeout: float = 10.0,
    ) -> None:
        if not isinstance(url, str):  # not shown: perhaps with a password
            raise ConfigError(f"a URL of type {type(url).__name__}: give text.")
        lives = ttl is None or (type(ttl) is int and 1 <= ttl < 2**31)
        need(lives, "ttl", ttl, "whole seconds, at least 1, or None")
        need(isinstance(prefix, str), "prefix", prefix, "text")
        need(isinstance(renew, bool), "renew", renew, "True or False")
        waits = type(timeout) in (int, float) and 0 < timeout < math.inf
        need(waits, "timeout", timeout, "more than 0 seconds")
        self.where = name_of_redis(url)
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise StoreError(
                f'{self.where} needs redis-py: pip install "nexusquant[store]".'
            ) from error
        self._ttl = ttl
        self._renewed = ttl if renew else None
        self._prefix = prefix
        self._error = redis.RedisError
        try:
            self._redis = redis.Redis.from_url(
                url,
                protocol=2,  # what servers and proxies of every age speak
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            )
            pool = self._redis.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # refuses what it does not know
        except (ValueError, TypeError, redis.RedisError) as error:
            secret = "@" in url  # which the error may quote
            raise ConfigError(
                f"{self.where} is not a URL of Redis"
                f" ({'user, password, host or port' if secret else error}): give"
                " redis://host:port/db, rediss://host:port/db or unix:///path?db=0, and %23, %2F,"
                " %3F, %40 for #, /, ? and @ in a password."
            ) from (None if secret else error)

    def close(self) -> None:
        super().close()
        self._redis.close()

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        name = self._prefix + key
        if stop is None:
            return self._read_many([key])[0]
        with self._errors(f"cannot read {key}"), self._pipeline() as pipe:
            pipe.exists(name)
            if start < stop:  # Redis counts the last byte in
                pipe.getrange(name, min(start, _LARGEST), min(stop, _LARGEST + 1) - 1)
            if self._renewed is not None:
                pipe.expire(name, self._renewed)
            there, *rest = pipe.execute()
            if not there:
                return None
            return bytes(rest[0]) if start < stop else b""

    def _read_many(self, keys: list[str]) -> list[bytes | None]:
        names = [self._prefix + key for key in keys]
        if not names:
            return []
        with self._errors(f"cannot read {_few(keys)}"), self._pipeline() as pipe:
            pipe.mget(names)
            if self._renewed is not None:
                for name in names:
                    pipe.expire(name, self._renewed)
            values: list[bytes | None] = pipe.execute()[0]
            return values

    def _size(self, key: str) -> int | None:
        name = self._prefix + key
        with self._errors(f"cannot look for {key}"), self._pipeline() as pipe:
            pipe.strlen(name)
            pipe.exists(name)
            length, there = pipe.execute()
            return int(length) if there else None

    def _contains_many(self, keys: list[str]) -> list[bool]:
        with self._errors(f"cannot look for {_few(keys)}"), self._pipeline() as pipe:
            for key in keys:
                pipe.exists(self._prefix + key)
            return [bool(there) for there in pipe.execute()]

    def _put(self, key: str, data: memoryview) -> None:
        if len(data) > _LARGEST:
            raise StoreError(
                f"{self.where}: {key} has {len(data)} bytes, Redis takes at most {_LARGEST}"
                " (512 MiB). Keep such values in a directory or an object store."
            )
        with self._errors(f"cannot write {key} ({len(data)} bytes)"):
            self._redis.set(self._prefix + key, data, ex=self._ttl)

    def _delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            self._redis.delete(self._prefix + key)

    def _keys(self) -> Iterator[str]:
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + "*"
        with self._errors("cannot list the keys"):
            names = set(self._redis.scan_iter(pattern, count=1000))  # it may repeat some
        keys = (name.decode("utf-8", "replace").removeprefix(self._prefix) for name in names)
        return (key for key in keys if is_key(key))

    def _pipeline(self) -> Pipeline:
        """Commands that go together, and that the server runs with no other in between."""
        return self._redis.pipeline(transaction=True)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreError(
                f"{self.where}: {what} ({error or type(error).__name__}). Check that the server"
                " runs, takes these credentials and has memory left."
            ) from error


def _few(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)} values"
