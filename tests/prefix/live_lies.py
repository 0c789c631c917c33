"""Live files that can be changed at will and sealed again, with digests that are right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache as once
from typing import Any

import pytest

from nexusquant import ConfigError, FormatError, NexusCache, NonFiniteError, ProfileError, nxq
from nexusquant.hf.hybrid import LinearStateLayer
from nexusquant.hf.profiles import remember_profile
from nexusquant.nxq import canonical
from nexusquant.prefix.live import live_streams
from tests.hf.models import left_padded, prompt, tiny
from tests.prefix.live_cases import UNEVEN, feed, loaded
from tests.zoo.builders import build

KINDS = ("profile", "plain", "uneven", "exact", "sliding", "bounded", "hybrid", "fresh")
Path = tuple[str | int, ...]


@once
def case(kind: str) -> tuple[Any, NexusCache]:
    """A model and a cache that together have all that a file can have."""
    model = {"sliding": "gemma3"}.get(kind, "llama")
    if kind == "hybrid":
        hybrid = build("falcon_h1")
        cache = NexusCache(hybrid)
        feed(hybrid, cache, prompt(60))
        return hybrid, cache
    lively = tiny(model)
    settings: dict[str, Any] = {
        "uneven": UNEVEN,
        "exact": {**UNEVEN, "codec": "exact"},
        "bounded": {"max_tokens": 64, "recent": 8},
    }.get(kind, {})
    cache = NexusCache(lively, "balanced", **settings)
    lengths = {"profile": [500], "uneven": [440, 300], "exact": [440, 300]}
    ids, mask = left_padded(lengths.get(kind, [70, 40]))
    feed(lively, cache, ids, mask)
    feed(lively, cache, prompt(25 if kind == "fresh" else 5, len(ids)))
    if cache.profile is not None:
        remember_profile(lively, cache.profile)  # the files do not hold it
    return lively, cache


class File:
    """The content of a live file, to be changed and sealed again."""

    def __init__(self, kind: str, codec: str = "raw") -> None:
        self.model, cache = case(kind)
        self.meta, self.streams = live_streams(cache, codec)
        self.abouts = {name: json.loads(chunks[0]) for name, chunks in self.streams.items()}
        self.abouts["header"] = self.meta["live"]

    def clone(self) -> File:
        new = object.__new__(File)
        new.model = self.model
        new.meta, new.streams = copy.deepcopy((self.meta, self.streams))
        new.abouts = copy.deepcopy(self.abouts)
        return new

    def data(self) -> bytes:
        for name, about in self.abouts.items():
            if name != "header":
                self.streams[name][0] = canonical.encode(about)
        return nxq.pack({**self.meta, "live": self.abouts["header"]}, self.streams)

    def load(self) -> Any:
        return loaded(self.data(), self.model)

    def refused(self, match: str | None = None) -> None:
        with pytest.raises(FormatError, match=match):
            self.load()


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every member and element of a description, containers first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inside):
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*path, key))


def at(about: Any, path: Path) -> Any:
    for key in path:
        about = about[key]
    return about


def change(about: Any, path: Path, value: Any) -> None:
    at(about, path[:-1])[path[-1]] = value


def survives(file: File, undamaged: bytes) -> bool:
    """Whether a changed file loads. Then it is as good as any: the model goes on with it."""
    try:
        data = file.data()
        cache = loaded(data, file.model)
    except (ConfigError, FormatError, ProfileError):  # Config: what no file can hold
        return False
    states = any(isinstance(layer, LinearStateLayer) for layer in cache.layers)
    # Masks of a billion columns take gigabytes; PyTorch refuses states of other shapes.
    if data != undamaged and cache.get_seq_length() < 5000 and not states:
        batch = max(layer.batch_size for layer in cache.layers)
        for count in (1, 40):
            with suppress(NonFiniteError):  # huge numbers are numbers
                feed(file.model, cache, prompt(count, max(batch, 1)))
    return True
