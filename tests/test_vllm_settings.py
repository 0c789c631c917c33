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
        ({"store": "x", "retry_seconds": -1}, "retry_seconds=-1"),
    ],
)
def test_wrong_settings_say_what_is_right(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Settings.read(given)


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
