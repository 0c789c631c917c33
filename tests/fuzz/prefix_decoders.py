"""What decodes the chunks of stored prefixes, for the fuzzing harness; see README.md."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import torch

from nexusquant import NexusCache, nxq
from nexusquant.errors import FormatError, NexusQuantError
from nexusquant.prefix.decoded import decode_layers
from nexusquant.prefix.live import live_streams, load_live
from nexusquant.prefix.loading import prefix_tokens
from nexusquant.prefix.payloads import PAYLOADS
from tests.prefix.stored_cases import case, ids, read
from tests.prefix.stored_lies import layers_of, small

KIND = "gemma3"  # layers with and without a window
TOKENS = 60
_calls = itertools.count()


def seeds() -> dict[str, bytes]:
    """Files that the encoders wrote, by name."""
    model, _ = case(KIND)
    found = {"entropy.nxq": small(KIND, TOKENS)}
    for name, settings in {"high": {}, "exact": {"codec": "exact"}, "short": {"tiers": ()}}.items():
        cache = read(model, ids(TOKENS), NexusCache(model, "high", **settings))
        for codec in PAYLOADS if name == "high" else ("zstd+delta",):
            found[f"{name}-{codec}.nxq"] = nxq.pack(*live_streams(cache, codec))
    return found


def write_seeds(folder: Path) -> None:
    """`seeds` as files, unless there are some."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        if not (folder / name).exists():
            (folder / name).write_bytes(data)


def decode(reader: nxq.Reader) -> None:
    """Read a file as `load` does, but for its fingerprint.

    Raises:
        FormatError: it is refused.
    """
    if next(_calls) % 1000 == 0:
        gc.collect()  # caches that were refused half way
    try:
        prefix_tokens(reader)
        if reader.meta.get("codec") in tuple(PAYLOADS):
            load_live(reader, case(KIND)[0])
        else:
            _check(reader)
    except FormatError:
        raise
    except NexusQuantError as error:
        raise FormatError(str(error)) from error


def _check(reader: nxq.Reader) -> None:
    layers = layers_of(KIND)
    found = decode_layers(reader, layers, case(KIND)[1], lambda step: None)
    for index, layer in layers.items():
        source = found.layers[index]
        heads, *dims = layer.shape
        for x, dim in zip((source.keys, source.values), dims, strict=True):
            assert x.shape == (heads, found.tokens - source.start, dim)
            assert bool(torch.isfinite(x).all())
