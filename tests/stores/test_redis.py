"""The Redis store: times to live, servers that go away, values that are too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import RedisStore
from tests.stores.servers import HalfAnswers, RedisServer, running


@pytest.fixture
def raw(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """The empty server as redis-py shows it."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that this test may kill."""
    with running() as server:
        yield server


def test_a_unix_socket_is_the_same_server(redis_server: RedisServer, raw: redis.Redis) -> None:
    with RedisStore(redis_server.url) as one, RedisStore(redis_server.unix) as other:
        one.put("key", b"value")
        assert other.get("key") == b"value"
    assert raw.keys() == [b"nexusquant:key"]


def test_prefixes_keep_stores_apart(redis_server: RedisServer, raw: redis.Redis) -> None:
    raw.set("key", b"somebody else's")
    raw.set("a:../key", b"not one of ours")
    prefixes = ["", "a:", "a?", "[a", "a\\", "ä:"]
    for prefix in prefixes:
        with RedisStore(redis_server.url, prefix=prefix) as store:
            store.put("mine", prefix.encode())
    for prefix in prefixes[1:]:
        with RedisStore(redis_server.url, prefix=prefix) as store:
            assert list(store.keys()) == ["mine"]
            assert store.get("mine") == prefix.encode()


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.get("key"),
        lambda store: store.get_range("key", 0, 2),
        lambda store: store.get_many(["none", "key"]),
    ],
)
@pytest.mark.parametrize("renew", [True, False])
def test_reading_renews_the_time_to_live(
    redis_server: RedisServer,
    raw: redis.Redis,
    read: Callable[[RedisStore], object],
    renew: bool,
) -> None:
    with RedisStore(redis_server.url, 1000, renew=renew) as store:
        store.put("key", b"value")
        assert 990 < raw.ttl("nexusquant:key") <= 1000
        raw.expire("nexusquant:key", 100)
        store.contains_many(["key"])  # no use
        store.size("key")
        assert raw.ttl("nexusquant:key") <= 100
        read(store)
        assert (raw.ttl("nexusquant:key") > 990) is renew


def test_values_end_with_their_time(redis_server: RedisServer, raw: redis.Redis) -> None:
    with RedisStore(redis_server.url, 1) as store, RedisStore(redis_server.url) as forever:
        store.put("short", b"value")
        forever.put("long", b"value")
        assert raw.ttl("nexusquant:long") == -1
        end = time.monotonic() + 10
        while store.contains("short"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert store.get("short") is None
        assert forever.get("long") == b"value"


def test_a_value_that_redis_cannot_take_is_refused(redis_server: RedisServer) -> None:
    with RedisStore(redis_server.url) as store:
        store.put("key", b"before")
        with pytest.raises(StoreError, match="at most 536870912"):
            store.put("key", bytes(512 * 2**20 + 1))
        assert store.get("key") == b"before"


def test_what_the_server_refuses_is_a_store_error(
    redis_server: RedisServer, raw: redis.Redis
) -> None:
    raw.lpush("nexusquant:list", "not a string")
    with RedisStore(redis_server.url) as store:
        with pytest.raises(StoreError, match=r"127\.0\.0\.1.*cannot read list .*WRONGTYPE"):
            store.get_range("list", 0, 1)
        store.put("key", b"before")
        raw.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreError, match=r"cannot write key \(3000000 bytes\).*memory"):
                store.put("key", bytes(3_000_000))
        finally:
            raw.config_set("maxmemory", "0")


def test_passwords_stay_out_of_messages(redis_server: RedisServer) -> None:
    url = redis_server.url.replace("redis://", "redis://user:hush@")
    with RedisStore(url) as store:
        with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1") as caught:
            store.get("key")
        assert "hush" not in f"{caught.value} {store}"


def test_a_server_that_is_killed_and_comes_back(own_server: RedisServer) -> None:
    with RedisStore(own_server.url) as store:
        store.put("key", b"value")
        assert store.get("key") == b"value"
        own_server.stop()
        calls: list[Callable[[], object]] = [
            lambda: store.get("key"),
            lambda: store.get_range("key", 0, 1),
            lambda: store.get_many(["key"]),
            lambda: store.contains_many(["key"]),
            lambda: store.size("key"),
            lambda: store.put("key", b"value"),
            lambda: store.delete("key"),
            lambda: list(store.keys()),
        ]
        for call in calls:
            started = time.monotonic()
            with pytest.raises(StoreError, match="Check that the server runs"):
                call()
            assert time.monotonic() - started < 2
        own_server.start()
        assert store.get("key") is None  # it kept nothing
        store.put("key", b"again")
        own_server.stop()
        own_server.start()  # unnoticed
        store.put("key", b"and again")
        assert store.get("key") == b"and again"


def test_half_a_value_is_an_error() -> None:
    with HalfAnswers() as server, RedisStore(server.url) as store:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"cannot read key .*closed by server"):
                store.get("key")
            with pytest.raises(StoreError, match=r"cannot read key .*closed by server"):
                store.get_range("key", 0, 5)


def test_half_a_value_and_silence_is_an_error_after_the_timeout() -> None:
    with HalfAnswers(hang=True) as server, RedisStore(server.url, timeout=0.2) as store:
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot read key .*Timeout"):
            store.get("key")
        assert time.monotonic() - started < 5


def test_nobody_at_the_address() -> None:
    with (
        RedisStore("redis://127.0.0.1:1") as store,
        pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1: cannot read key .*refused"),
    ):
        store.get("key")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("url", None, "a URL of type NoneType: give text"),
        ("url", b"redis://user:hush@h", "^a URL of type bytes: give text.$"),
        ("prefix", 5, "prefix=5: must be text"),
        ("prefix", b"x", "prefix=b'x': must be text"),
        ("renew", "false", "renew='false': must be True or False"),
        ("timeout", "5", "timeout='5': must be more than 0 seconds"),
        ("timeout", float("nan"), "timeout=nan"),
        ("timeout", float("inf"), "timeout=inf"),
        ("timeout", True, "timeout=True"),
    ],
)
def test_arguments_of_other_types(name: str, value: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RedisStore(**{"url": "redis://h", name: value})


@pytest.mark.parametrize("ttl", [0, -1, 1.5, True, "60", 2**31])
def test_times_that_redis_cannot_keep(ttl: int) -> None:
    with pytest.raises(ConfigError, match="whole seconds"):
        RedisStore("redis://localhost", ttl)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "redis://localhost?colour=blue",
        "redis://localhost?db=one",
        "redis://localhost:port",
        "redis://[::1",
    ],
)
def test_urls_that_are_none_of_redis(url: str) -> None:
    with pytest.raises(ConfigError, match="not a URL of Redis"):
        RedisStore(url)
