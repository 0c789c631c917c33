"""A live compressed cache as streams of an .nxq file, bit for bit, and back (docs/FORMAT.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nexusquant.config import CompressionConfig
from nexusquant.errors import ConfigError, FormatError, UnsupportedError
from nexusquant.hf.cache import NexusCache, checked_model, text_config
from nexusquant.hf.coverage import cover
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.quirks import layer_of
from nexusquant.hf.rope_tables import LayerRope, RopeBook
from nexusquant.hf.transformers_private import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Cache
from nexusquant.nxq import Reader
from nexusquant.prefix.arrays import ArrayReader, ArrayWriter
from nexusquant.prefix.fields import Fields
from nexusquant.prefix.live_coded import Coder
from nexusquant.prefix.live_layers import (
    Surroundings,
    Whole,
    kind_of,
    read_layer,
    whole_of,
    write_layer,
)
from nexusquant.prefix.live_rope import read_table, write_table
from nexusquant.prefix.payloads import LEVEL, PAYLOADS, Payload, payload_of
from nexusquant.prefix.profile_identity import matching_profile, profile_digest
from nexusquant.profile import Profile

VERSION = 1
_MAX_LENGTH = (1 << 30) - 1
_MAX_BATCH = 1 << 20
_REMEMBER = ("recurrent_gemma",)  # its modules hold the recurrent state of the last forward pass


def live_streams(
    cache: Cache,
    codec: str = "raw",
    *,
    level: int = LEVEL,
    report: Callable[[str], None] = lambda step: None,
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Header and streams of a compressed cache, as it is.

    Args:
        cache: a `NexusCache` or a cache made in a `nexusquant_evict` block.
        codec: "raw", "zstd" or "zstd+delta".
        level: of zstandard, 1 to 22.
        report: called with a line of text as each layer starts.

    Raises:
        NonFiniteError: NaN or infinity in what was not compressed.
        UnsupportedError: not such a cache, something is under way, or a layer of a kind that cannot
            be saved.
        ConfigError: no such codec or level.
    """
    payload = payload_of(codec, level)
    layers: list[Any] = list(cache.layers)
    whole, config = whole_of(layers), _config_of(cache)
    streams: dict[str, list[bytes]] = {}
    for index, layer in enumerate(layers):
        if kind_of(layer, index) is not None:
            report(f"layer {index + 1} of {len(layers)}")
            out = ArrayWriter(payload)
            about = write_layer(layer, index, whole, out)
            streams[f"layer.{index}"] = out.chunks(about)
    for number, table in enumerate(whole.tables):
        out = ArrayWriter(payload)
        streams[f"rope.{number}"] = out.chunks(write_table(table, whole.batch, out))
    profile = live_profile(cache)
    about = {
        "version": VERSION,
        "config": json.loads(config.to_json()),
        "model": _fingerprint_of(layers),
        "layers": len(layers),
        "sequences": whole.batch,
        "tokens": whole.length,
        "profile": None if profile is None else profile_digest(profile),
    }
    return {"codec": codec, "live": about}, streams


def _config_of(cache: Cache) -> CompressionConfig:
    """What the cache was made with; sliding-window layers have less of it."""
    layers = [x for x in cache.layers if isinstance(x, CompactLayer)]
    if not layers:
        raise UnsupportedError(
            f"no layer of this {type(cache).__name__} is compressed: a live copy is of a NexusCache"
            " or a cache made in a nexusquant_evict block."
        )
    return next((x for x in layers if not x.is_sliding), layers[0]).config


def _fingerprint_of(layers: list[Any]) -> str:
    """Of the model that a cache belongs to."""
    lease = next(x.lease for x in layers if isinstance(x, CompactLayer))
    model = None if lease is None else lease.model
    if model is not None:
        _check_model(model)
        return fingerprint(model)
    if lease is None or not lease.detached:
        raise UnsupportedError("the model of this cache does not exist any more.")
    return lease.fingerprint


def _check_model(model: Any) -> None:
    """Raise `UnsupportedError` if a cache is not all that the model remembers."""
    if text_config(model).model_type in _REMEMBER:
        raise UnsupportedError(
            f"{type(model).__name__} keeps a state outside of its cache: such a cache cannot be"
            " saved."
        )


def live_profile(cache: Cache) -> Profile | None:
    """The profile that the codes of a cache need, if they need one."""
    books = (x.profiles for x in cache.layers if isinstance(x, CompactLayer))
    profile = next((book.profile for book in books if book is not None), None)
    if profile is not None and not profile.complete:
        raise UnsupportedError("the model's profile is being built: save when the pass is over.")
    return profile


@torch.no_grad()
def load_live(
    reader: Reader,
    model: nn.Module,
    profile: ProfileLike = None,
    held: Callable[[str], bytes | None] = lambda digest: None,
    report: Callable[[str], None] = lambda step: None,
) -> NexusCache:
    """The cache that `live_streams` was given, on the model's devices; it goes on as that would.

    Args:
        reader: of a file with these streams.
        model: same weights and config as the model before.
        profile: the profile that the cache was made with, or its file. Default: the one that the
            model's caches use, one in the user's cache directory, or what is `held`.
        held: the file of the profile of a digest, if it came with the cache.
        report: called with a line of text as each layer starts.

    Raises:
        FormatError: the file is damaged, or lies.
        UnsupportedError: another model, or one that cannot have a compressed cache.
        ProfileError: the profile is not there, or another one was given.
    """
    model = checked_model(model)
    _check_model(model)
    header = Fields(reader.meta, "header")
    payload, about = payload_of(header.choice("codec", PAYLOADS)), header.part("live")
    about.integer("version", VERSION, VERSION)
    made_with, mine = about.text("model"), fingerprint(model)
    if made_with != mine:
        raise UnsupportedError(
            f"this cache was made with another model: its fingerprint is {made_with!r}, this one's"
            f" is {mine!r}. The weights or the config are different."
        )
    config = _read_config(about)
    found = _read_profile(about, model, config, profile, held)
    cache = NexusCache(model, config, profile=profile if found is None else found)
    cache._profiles.profile = found  # also if there was none: what follows is coded alike
    layers: list[Any] = cache.layers
    about.integer("layers", len(layers), len(layers))
    batch, length = (
        about.integer("sequences", 0, _MAX_BATCH),
        about.integer("tokens", 0, _MAX_LENGTH),
    )
    about.close()
    source = _Source(reader, payload, model, config, found)
    _read_layers(layers, Whole(batch, length), source, report)
    return cache


def _read_config(about: Fields) -> CompressionConfig:
    try:
        return CompressionConfig.from_json(json.dumps(about.get("config")))
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{about.where}, config: {error}") from error


def _read_profile(
    about: Fields,
    model: nn.Module,
    config: CompressionConfig,
    given: ProfileLike,
    held: Callable[[str], bytes | None],
) -> Profile | None:
    """The profile that the cache was made with, if there was one."""
    if about.is_null("profile"):
        return None
    if config.codec != "e8" or config.transform != "klt":
        raise about.fail("profile", "null with a config that uses none")
    wanted = about.text("profile")
    if not re.fullmatch("[0-9a-f]{32}", wanted):
        raise about.fail("profile", "32 hex digits")
    return matching_profile(model, config.rope_page, wanted, given, lambda: held(wanted))


@dataclass(frozen=True)
class _Source:
    """Where layers are read from, and what they are for."""

    reader: Reader
    payload: Payload
    model: nn.Module
    config: CompressionConfig
    profile: Profile | None

    def arrays(self, stream: str, device: torch.device) -> ArrayReader:
        return ArrayReader(self.reader, stream, self.payload, device)


def _read_layers(
    layers: list[Any], whole: Whole, source: _Source, report: Callable[[str], None]
) -> None:
    model, devices, known = source.model, _devices(source.model), _known_shapes(source.model)
    own: Any = model.device
    for index, layer in enumerate(layers):
        if kind_of(layer, index) is None:
            continue
        report(f"layer {index + 1} of {len(layers)}")
        device = devices.get(index, own)

        def table(number: int, device: torch.device = device) -> LayerRope:
            if number < len(whole.tables):
                return LayerRope(whole.tables[number], owner=False)
            arrays = source.arrays(f"rope.{number}", device)
            whole.tables.append(read_table(arrays, model, whole.batch, whole.length))
            return LayerRope(whole.tables[number], owner=True)

        coder = Coder(source.config, index, source.profile)
        around = Surroundings(whole, coder, known.get(index), table)
        read_layer(layer, index, source.arrays(f"layer.{index}", device), around)
    book = RopeBook.of(whole.tables)
    for layer in layers:
        if isinstance(layer, CompactLayer):
            layer.book = book


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Where each layer of the model computes."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index = layer_of(module)
        parameter = next(module.parameters(), None)
        if index is None or index in found or parameter is None:
            continue
        hook = getattr(module, "_hf_hook", None)  # of accelerate, where weights are elsewhere
        device = getattr(hook, "execution_device", None)
        if device is None and not parameter.is_meta:
            device = parameter.device
        if device is not None:
            found[index] = torch.device(device)
    return found


def _known_shapes(model: nn.Module) -> dict[int, tuple[int, int, int]]:
    """KV heads and dimensions of every layer, of models that transformers has."""
    config: Any = model.config
    if text_config(model).model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {}
    shapes = enumerate((x.kv_heads, x.key_dim, x.value_dim) for x in cover(config).layers)
    return {index: shape for index, shape in shapes if all(shape)}
