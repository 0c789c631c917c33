"""Stores by their URL, and what is wrong with a URL."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import DirectoryStore, FsspecStore, RedisStore, open_store
from nexusquant.stores.urls import parse_size


def test_paths_are_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "100%25 odd #1"
    places = {
        str(tmp_path): tmp_path,
        "relative": tmp_path / "relative",
        "~/kv": tmp_path / "home" / "kv",
        f"file://{tmp_path}/a%20b": tmp_path / "a b",
        f"FILE://localhost{tmp_path}": tmp_path,
        f"{odd}?max_bytes=2GiB": odd,
        f"file://{tmp_path}/f?max_bytes=2GiB&sync=false": tmp_path / "f",
    }
    for place, path in places.items():
        store = open_store(place)
        assert isinstance(store, DirectoryStore)
        assert store.path == path
        assert path.exists() == (path == tmp_path), "made by the first put"
        assert store.max_bytes == (2**31 if "?" in place else None)
    assert open_store(tmp_path / "what?ttl=1").where == str(tmp_path / "what?ttl=1")


def test_limits_come_as_arguments_too(tmp_path: Path) -> None:
    for limit in (1000, "1000", "1KB", "1 kb", "0.001MB", "1000B"):
        store = open_store(tmp_path, max_bytes=limit)
        assert isinstance(store, DirectoryStore)
        assert store.max_bytes == 1000
    with open_store("redis://localhost", ttl=60) as redis:
        assert isinstance(redis, RedisStore)
        assert redis._ttl == 60  # to be seen nowhere else


@pytest.mark.parametrize(
    ("url", "where"),
    [
        (
            "redis://localhost:6379/2?ttl=3600&prefix=a:&renew=false&timeout=3",
            "redis://localhost:6379/2",
        ),
        ("rediss://user:hush@localhost?ssl_cert_reqs=none&db=3", "rediss://localhost?db=3"),
        ("redis://user:hu%2Fsh%40@[::1]:6379/3", "redis://[::1]:6379/3"),
        ("redis://localhost/?db=1", "redis://localhost/?db=1"),
        ("unix:///run/redis.sock?db=1&ttl=1", "unix:///run/redis.sock?db=1"),
        ("unix://user:hush@/run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_redis(url: str, where: str) -> None:
    with open_store(url) as store:
        assert isinstance(store, RedisStore)
        assert store.where == where
        assert "hush" not in repr(store)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:alpha/omega@h:1/0",
        "redis://user:alpha#omega@h:1/0",
        "redis://user:alpha?omega@h:1/0",
        "redis://user:alpha@omega/alpha@h:1/0",
        "redis://user:12/omega@h:1/0",
        "redis://:alpha/omega@h",
        "redis://user:alpha@h:port",
        "redis://user:alpha@h/one",
        "redis://user:alpha@\u2100/0",
        "redis://user:alpha/omega@h?colour=blue",
        "unix://user:alpha/omega@h",
        "redis:user:alpha@h",
        "redis:/user:alpha@h/0",
        "file://user:alpha@h/share",
    ],
)
def test_passwords_stay_out_of_refusals(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__cause__ is None
    assert re.search("alpha|omega", shown) is None


def test_everything_else_is_for_fsspec() -> None:
    with open_store("memory://some/where") as store:
        assert isinstance(store, FsspecStore)
        store.put("key", b"value")
        store.delete("key")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/kv?size=3", r"/kv has no option size: it takes max_bytes, sync"),
        ("/kv?ttl=3", r"no option ttl"),
        ("/kv?max_bytes=3&max_bytes=4", "given twice"),
        ("/kv?max_bytes", "name=value"),
        ("/kv?max_bytes=much", r"max_bytes=much: must be a size such as 2GiB"),
        ("/kv?max_bytes=0", "must be a size"),
        ("/kv?max_bytes=-1", "must be a size"),
        ("/kv?sync=1", "sync=1: must be true or false"),
        ("file://server/share", "file:///absolute/path"),
        ("file://", "file:///absolute/path"),
        ("redis://h?max_bytes=1", r"redis://h has no option max_bytes: it takes .*ttl"),
        ("redis://h?decode_responses=true", "no option decode_responses"),
        ("redis://h?ttl=1h", "give whole seconds"),
        ("redis://h?ttl=0", "whole seconds, at least 1"),
        ("redis://h?timeout=0", "more than 0"),
        ("redis://h?ssl_colour=blue", "ssl_colour"),
        ("memory://a?ttl=1&b=2", r"memory://a has no option b, ttl: it takes none"),
        ("nosuch://a", "not a place that fsspec opens"),
        ("", "path='': must be that of a directory"),
        ("?max_bytes=1MB", "path='': must be"),
        ("a\0b", "path='a.x00b': must be"),
        ("redis:/localhost", "^redis: without `//` behind it is no URL"),
        ("file:rel", "^file: without `//`"),
        ("s3:bucket/kv", "^s3: without `//`"),
        ("redis:a\0", "^redis: without `//`"),
        ("redis://h/0?db=1", "redis://h/0 says db=1, too: give one database"),
        ("redis://h/0/1", "redis://h/0/1 is not a URL of Redis"),
        ("redis://h/name", "redis://h/name is not a URL of Redis"),
        ("unix://relative?db=0", "not a URL of Redis"),
        (3, "3 is not a place"),
        (None, "None is not a place"),
    ],
)
def test_what_is_wrong_with_a_place(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store(place)


def test_options_that_do_not_fit_the_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option ttl"):
        open_store(tmp_path, ttl=60)
    with pytest.raises(ConfigError, match="no option max_bytes"):
        open_store("memory://a", max_bytes=1000)
    with pytest.raises(ConfigError, match="max_bytes=2, but the place says max_bytes=1"):
        open_store(f"{tmp_path}?max_bytes=1", max_bytes=2)
    with pytest.raises(ConfigError, match="must be a size"):
        open_store(tmp_path, max_bytes=0)
    wrong: Any
    for wrong in (1.5, True, [3]):
        with pytest.raises(ConfigError, match=r"max_bytes=.*: must be an integer, or text"):
            open_store(tmp_path, max_bytes=wrong)
        with pytest.raises(ConfigError, match=r"ttl=.*: must be an integer, or text"):
            open_store("redis://h", ttl=wrong)


def test_folders_that_look_like_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:").mkdir()
    for place in ("there:", "./new:one", "sub/a:b", "C:kv", str(tmp_path / "a:b")):
        assert open_store(place).where == str(tmp_path / place)
    assert open_store(Path("new:two")).where == str(tmp_path / "new:two")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5k", 1536), ("1T", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1XB", "1e3", "nan", "1.2.3", "-1", "9" * 30, "1IB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="2GiB or 500MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("package", "place"), [("redis", "redis://host"), ("fsspec.core", "memory://a")]
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, package: str, place: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StoreError, match=r'pip install "nexusquant\[store\]"'):
        open_store(place)
