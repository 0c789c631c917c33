"""`save`: prefixes into files and stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.hf.cache import cache_stats, checked_model
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import StoreProfileLike, need_store_profile
from nexusquant.hf.transformers_private import Cache
from nexusquant.nxq import Reader, pack, write_file
from nexusquant.prefix import coded
from nexusquant.prefix.arguments import check_target, path_of, token_bytes
from nexusquant.prefix.companion import STREAM, Companion, keep_beside
from nexusquant.prefix.live import live_profile, live_streams
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
        nbytes: of everything, header, checksums and an embedded profile included.
        tokens: in the prefix.
        ratio: fp16 bytes of the uncompressed cache over `nbytes`.
        profile_nbytes: of the profile that went along: in `nbytes` if it is embedded, else beside
            the prefix in the store, once for all prefixes; 0 if none did.
        embedded: whether the profile is in the file.
    """

    key: str
    nbytes: int
    tokens: int
    ratio: float
    profile_nbytes: int = 0
    embedded: bool = False

    def __str__(self) -> str:
        profile = f"{self.profile_nbytes / 2**20:.2f} MiB are the model's profile"
        where = f", {profile}" if self.embedded else f"; {profile}, beside it"
        return (
            f"{self.tokens:,} tokens in {self.nbytes / 2**20:.2f} MiB, {self.ratio:.1f}x smaller"
            f" than fp16{where if self.profile_nbytes else ''}: {self.key}"
        )


def save(
    cache: Any,
    target: str | Path | Store,
    *,
    model: nn.Module | None = None,
    tokens: Tensor | Iterable[int] | None = None,
    codec: str = "auto",
    bits: float | None = None,
    profile: StoreProfileLike = None,
    embed_profile: bool | None = None,
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
        tokens: token ids of the prefix, (n,) or (1, n). `load` does without them, `nexusquant
            generate --prefix` does not.
        codec: "entropy", or for compressed caches "raw", "zstd", "zstd+delta"; "auto" chooses.
        bits: per element, for "entropy": 16 / bits is about the ratio. docs/results says what KL
            they give; 1.5 (the default) is about 10x, 0.5 about 33x.
        profile: storage profile or its file; default: the model's (`nexusquant calibrate --store`).
        embed_profile: whether the profile (megabytes) is in the file, which then needs nothing
            else. None: in a file if it is not one of those in the user's cache directory, which
            another process would find; in a store beside the prefixes, once for all of them.
        key: in a store; default: a digest of what is stored.
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
        >>> output = model.generate(input_ids, cache=cache, max_new_tokens=8)
        >>> with TemporaryDirectory() as folder:
        ...     print(save(cache, f"{folder}/prefix.nxq"))
        407 tokens in 0.0... MiB, ...x smaller than fp16, 0.0... MiB are the model's profile: ...
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedError(f"expected a cache with layers, got {type(cache).__name__}.")
    check_target(target, key)
    owner = _model_of(cache, model)
    codec = _codec(cache, codec, bits, profile)
    length = int(cache.get_seq_length())
    if not length:
        raise UnsupportedError("this cache is empty: there is nothing to save.")
    ids = token_bytes(tokens, length, owner)
    if codec == coded.NAME:
        known, layers = need_store_profile(owner, profile), sources(cache)
        rate = DEFAULT_BITS if bits is None else bits
        meta, streams = coded.encode_prefix(layers, owner, known, rate, report)
        elements = sum(x.keys.numel() + x.values.numel() for x in layers)
        companion = Companion.of_store(known, profile)
    else:
        meta, streams = live_streams(cache, codec, report=report)
        if ids is not None and meta["live"]["sequences"] != 1:
            raise ConfigError("token ids are of one sequence: leave them out, or save one.")
        elements = cache_stats(cache).elements
        companion = Companion.of_live(live_profile(cache))
    meta = {
        **meta,
        "elements": elements,
        "fingerprint": fingerprint(owner),
        "model_type": owner.config.model_type,
        "tokens": length,
    }
    embedded, beside = companion.along(embed_profile, isinstance(target, Store))
    front = {"tokens": [ids]} if ids is not None else {}
    parts = {**front, **({STREAM: [embedded]} if embedded else {}), **streams}
    if isinstance(target, Store):
        data = pack(meta, parts)
        name = f"{Reader.open(data).digest.hex()}.nxq" if key is None else key
        if beside:
            keep_beside(target, companion.digest, beside)
        target.put(name, data)
        size = len(data)
    else:
        path = path_of(target)
        write_file(path, meta, parts)
        size, name = path.stat().st_size, str(path)
    return Saved(name, size, length, 2 * elements / size, len(embedded + beside), bool(embedded))


def _codec(cache: Any, codec: str, bits: Any, profile: StoreProfileLike) -> str:
    """The codec, whose options must be its own."""
    if codec == "auto":
        codec = coded.NAME if has_source(cache) else "raw"
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; known: auto, {', '.join(CODECS)}.")
    if codec == coded.NAME:
        if bits is not None and (
            not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 0.05 <= bits <= 16
        ):
            raise ConfigError(f"bits={bits!r}: must be a number from 0.05 to 16.")
        return codec
    for name, value in (("bits", bits), ("profile", profile)):
        if value is not None:
            raise ConfigError(
                f"{name}= is of the codec {coded.NAME!r}; {codec!r} copies what the cache has."
            )
    return codec


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
