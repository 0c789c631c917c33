"""Settings, versions, and the package where there is no vLLM."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from nexusquant import vllm
from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.vllm import versions
from nexusquant.vllm.settings import Settings


def test_settings() -> None:
    assert Settings.read({"store": "/var/cache/kv"}).codec == "e8"
    given: dict[str, Any] = {"store": "redis://h/0", "codec": "raw", "threads": 4}
    assert Settings.read(given) == Settings("redis://h/0", "raw", threads=4)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "store"),
        ({"store": 3}, "store"),
        ({"store": "x", "rate": 4}, "rate; known are store, codec"),
        ({"store": "x", "threads": 0}, "threads=0"),
        ({"store": "x", "threads": "2"}, "threads='2': must be an integer of at least 1"),
        ({"store": "x", "threads": 2.5}, "threads=2.5"),
        ({"store": "x", "threads": True}, "threads=True"),
        ({"store": "x", "queue_bytes": "256MiB"}, "queue_bytes='256MiB': must be an integer"),
        ({"store": "x", "queue_bytes": 1.5}, "queue_bytes=1.5"),
        ({"store": "x", "retry_seconds": -1}, "retry_seconds=-1"),
        ({"store": "x", "retry_seconds": None}, "retry_seconds=None: must be a number of seconds"),
        ({"store": "x", "lookup_seconds": "1"}, "lookup_seconds='1'"),
        ({"store": "x", "lookup_seconds": float("nan")}, "lookup_seconds=nan"),
        ({"store": "x", "lookup_seconds": float("inf")}, "lookup_seconds=inf"),
        ({"store": "x", "lookup_seconds": True}, "lookup_seconds=True"),
        ({"store": "x", "wait_for_save": "false"}, "wait_for_save='false': must be true, false"),
        ({"store": "x", "wait_for_save": 0}, "wait_for_save=0"),
        ({"store": "x", "model": 5}, "model=5: must be text, or null"),
        ({"store": "x", "model": ""}, "model=''"),
        ({"store": "x", "codec": None}, "codec=None: must be the name"),
        ({"store": "x", "codec": ["e8"]}, r"codec=\['e8'\]: must be the name"),
        ({"store": "x", "codec_options": 5}, "codec_options=5: must be an object"),
        ({"store": "x", "codec_options": "profile"}, "codec_options='profile'"),
        ({"store": "x", "codec_options": ["profile"]}, r"codec_options=\['profile'\]"),
        ({"store": "x", "codec_options": {5: 5}}, "codec_options={5: 5}"),
        ({"store": ""}, 'needs "store"'),
        ({"store": ["redis://user:hush@h"]}, "^store must be the URL of a store, or the path"),
    ],
)
def test_wrong_settings_say_what_is_right(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Settings.read(given)


def test_integers_will_do_for_seconds() -> None:
    found = Settings.read({"store": "x", "lookup_seconds": 0, "retry_seconds": 1})
    assert (found.lookup_seconds, found.retry_seconds, found.wait_for_save) == (0, 1, None)


@pytest.mark.parametrize("found", ["0.31.0", "0.32.0", "0.32.1.post2", "0.32.0+cpu"])
def test_tested_versions(found: str) -> None:
    versions.check(found)


@pytest.mark.parametrize("found", ["0.30.0", "0.33.0", "1.31.0", "dev"])
def test_other_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"0\.31 up to.* 0\.33.*NEXUSQUANT_VLLM_UNTESTED"):
        versions.check(found)
    monkeypatch.setenv(versions.OVERRIDE, "1")
    versions.check(found)


def test_without_vllm_the_connector_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    with pytest.raises(UnsupportedError, match="pip install"):
        _ = vllm.NexusQuantConnector
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vllm.Nothing
    assert importlib.import_module("nexusquant.vllm.keys")
