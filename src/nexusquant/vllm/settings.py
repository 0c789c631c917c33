"""Settings: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nexusquant.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What the connector is told.

    Attributes:
        store: URL of the store (`nexusquant.stores.open_store`): a directory, redis://, s3://, ...
        codec: "e8", "entropy" or "raw"; "entropy" if it is not said and codec_options have a
            "profile".
        codec_options: arguments of the codec, as {"bits": 6}.
        model: what the model is called in the keys of blocks, in place of what is found out about
            its weights. For servers that load the same weights in different ways.
        threads: that load, and as many that save, in each worker.
        queue_bytes: of keys and values that wait to be encoded in a worker; beyond it the model
            waits.
        wait_for_save: whether a prompt's blocks are in the store before its first token is
            answered. None: yes for a kv_producer, whose consumers look for them then; no for
            kv_both.
        lookup_seconds: how long the scheduler waits for the store before it goes on with other
            requests and asks again in its next step.
        retry_seconds: how long a store that failed is left alone, and a block that could not be
            loaded not looked for.

    Raises:
        ConfigError: of another type, or out of range.
    """

    store: str
    codec: str = "e8"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    threads: int = 2
    queue_bytes: int = 256 << 20
    wait_for_save: bool | None = None
    lookup_seconds: float = 0.01
    retry_seconds: float = 5.0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be {allowed}.")

        def text(value: object) -> bool:
            return isinstance(value, str) and value != ""

        if not text(self.store):  # not shown: it may hold a password
            raise ConfigError("store must be the URL of a store, or the path of a directory.")
        need(text(self.codec), "codec", 'the name of a codec, such as "e8"')
        options = isinstance(self.codec_options, Mapping) and all(map(text, self.codec_options))
        need(options, "codec_options", 'an object, such as {"bits": 6}')
        need(self.model is None or text(self.model), "model", "text, or null")
        for name in ("threads", "queue_bytes"):
            value = getattr(self, name)
            need(type(value) is int and value >= 1, name, "an integer of at least 1")
        wait = self.wait_for_save is None or isinstance(self.wait_for_save, bool)
        need(wait, "wait_for_save", "true, false or null")
        for name in ("lookup_seconds", "retry_seconds"):
            value = getattr(self, name)
            seconds = type(value) in (int, float) and 0 <= value < math.inf
            need(seconds, name, "a number of seconds of at least 0")

    @staticmethod
    def read(given: Mapping[str, Any]) -> Settings:
        """From vLLM's configuration.

        Raises:
            ConfigError: an unknown name (lists the known ones), or no store.
        """
        known = [entry.name for entry in fields(Settings)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config has {', '.join(unknown)}; known are {', '.join(known)}."
            )
        if not given.get("store"):
            raise ConfigError(
                'kv_connector_extra_config needs "store": the URL of a directory, of Redis'
                ' ("redis://127.0.0.1:6379/0") or of what fsspec opens.'
            )
        options = given.get("codec_options")
        with_profile = isinstance(options, Mapping) and "profile" in options
        return Settings(**{"codec": "entropy" if with_profile else "e8", **given})
