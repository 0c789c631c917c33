"""`save`: prefixes into files and stores."""

from __future__ import annotations

import hashlib
import json
import operator
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.hf.cache import cache_stats, checked_model
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import StoreProfileLike, need_store_profile
from nexusquant.nxq import pack, write_file
from nexusquant.prefix import coded
from nexusquant.prefix.live import live_streams
from nexusquant.prefix.loading import path_of
from nexusquant.prefix.payloads import PAYLOADS as LIVE_CODECS
from nexusquant.prefix.source import has_source, sources
from nexusquant.stores import Store

CODECS = (coded.NAME, *LIVE_CODECS)
DEFAULT_BITS = 1.5


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        key: in the store; the path of a file.
        nbytes: of everything, header and checksums included.
        tokens: in the prefix.
        ratio: fp16 bytes of the uncompressed cache over `nbytes`.
    """

    key: str
    nbytes: int
    tokens: int
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens in {self.nbytes / 2**20:.2f} MiB, {self.ratio:.1f}x smaller"
            f" than fp16: {self.key}"
        )


def save(
    cache: Any,
    target: str | Path | Store,
    *,
    model: nn.Module | None = None,
    tokens: Tensor | Iterable[int] | None = None,
    codec: str = "auto",
    bits: float = DEFAULT_BITS,
    profile: StoreProfileLike = None,
    embed_profile: bool = False,
    key: str | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> Saved:
    """Keep the prefix that a cache holds.

    A cache that still has keys and values as the model made them (`DynamicCache`, `NexusCache` with
    codec="exact") is entropy coded; of one that is compressed, the codes are copied exactly.

    Args:
        cache: of one sequence if entropy coded.
        target: a path, or a `nexusquant.stores.Store`.
        model: the cache's. Needed for stock caches.
        tokens: token ids of the prefix, (n,) or (1, n). `load` returns caches without them, but
            `nexusquant generate --prefix` and content addressing need them.
        codec: "entropy", or for compressed caches "raw", "zstd", "zstd+delta"; "auto" chooses.
        bits: per element, for "entropy": 16 / bits is about the ratio. docs/results says what KL
            they give; 1.5 is about 10x, 0.5 about 33x.
        profile: storage profile or its file; default: the model's (`nexusquant calibrate --store`).
        embed_profile: put the profile into the file, which then needs nothing else (megabytes).
        key: in a store; default: a digest of model, tokens, codec and its settings.
        report: called with a line of text as each step starts.

    Raises:
        ConfigError: arguments that do not fit together, tokens of another number than the cache's.
        ProfileError: there is no storage profile, or it is another model's.
        NonFiniteError: NaN or infinity in keys or values.
        UnsupportedError: a cache that the codec cannot take.
        StoreError: the disk or the store does not take it; nothing is left half written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from nexusquant import NexusCache, save
        >>> cache = NexusCache(model, quality="high")
        >>> output = model.generate(input_ids, past_key_values=cache, max_new_tokens=8)
        >>> with TemporaryDirectory() as folder:
        ...     print(save(cache, f"{folder}/prefix.nxq"))
        407 tokens in 0.0... MiB, ...x smaller than fp16: ...prefix.nxq
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedError(f"expected a cache with layers, got {type(cache).__name__}.")
    owner = _model_of(cache, model)
    if key is not None and not isinstance(target, Store):
        raise ConfigError("key is for stores; a file has its path.")
    if codec == "auto":
        codec = coded.NAME if has_source(cache) else "raw"
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; known: auto, {', '.join(CODECS)}.")
    if not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 0.05 <= bits <= 16:
        raise ConfigError(f"bits={bits!r}: must be a number from 0.05 to 16.")
    embedded: list[bytes] = []
    length = int(cache.get_seq_length())
    ids = _token_bytes(tokens, length)
    if isinstance(target, Store) and key is None and ids is None:
        raise ConfigError("give tokens=, or a key: a store needs a name for the prefix.")
    if codec == coded.NAME:
        known, layers = need_store_profile(owner, profile), sources(cache)
        meta, streams = coded.encode_prefix(layers, owner, known, bits, report)
        elements = sum(x.keys.numel() + x.values.numel() for x in layers)
        embedded = [known.to_bytes()] if embed_profile else []
    else:
        if profile is not None:
            raise ConfigError(f"codec={codec!r} uses no storage profile.")
        meta, streams = live_streams(cache, codec, with_profile=embed_profile)
        if ids is not None and meta["live"]["sequences"] != 1:
            raise ConfigError("token ids are of one sequence: leave them out, or save one.")
        elements = cache_stats(cache).elements
    meta = {
        **meta,
        "elements": elements,
        "fingerprint": fingerprint(owner),
        "model_type": owner.config.model_type,
        "tokens": length,
    }
    front = {"tokens": [ids]} if ids is not None else {}
    parts = {**front, **({"profile": embedded} if embedded else {}), **streams}
    if isinstance(target, Store):
        data = pack(meta, parts)
        name = content_key(meta, ids or b"") if key is None else key
        target.put(name, data)
        return Saved(name, len(data), length, 2 * elements / len(data))
    path = path_of(target)
    write_file(path, meta, parts)
    size = path.stat().st_size
    return Saved(str(path), size, length, 2 * elements / size)


def content_key(meta: dict[str, Any], ids: bytes) -> str:
    """Name of a prefix in a store: the same model, tokens and settings have the same."""
    digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    digest.update(ids)
    return f"{digest.hexdigest()}.nxq"


def _model_of(cache: Any, given: nn.Module | None) -> Any:
    """The model to save for, which is the cache's own if it has one."""
    leases = [x.lease for x in getattr(cache, "layers", []) if getattr(x, "lease", None)]
    model = given if given is not None else (leases[0].model if leases else None)
    if model is None:
        raise ConfigError("give model=, the one that this cache was made with.")
    checked: Any = checked_model(model)
    made_with = {x.fingerprint if x.model is None else fingerprint(x.model) for x in leases}
    if made_with - {fingerprint(checked), ""}:  # "": a model that does not exist any more
        raise ConfigError("this cache was made with another model than the one given.")
    return checked


def _token_bytes(tokens: Tensor | Iterable[int] | None, length: int) -> bytes | None:
    """Little-endian u32."""
    if tokens is None:
        return None
    try:
        listed = tokens.flatten().tolist() if isinstance(tokens, Tensor) else list(tokens)
        if len(listed) != length:
            raise ConfigError(f"{len(listed)} token ids, but the cache holds {length} tokens.")
        ids = array("I", [operator.index(x) for x in listed])
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"token ids must be integers from 0 to 2^32 - 1 ({error}).") from error
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
