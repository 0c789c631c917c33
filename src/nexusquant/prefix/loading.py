"""`load`: prefixes from files and stores."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import nn

from nexusquant.config import CompressionConfig, resolve_config
from nexusquant.errors import ConfigError, FormatError, StoreError, UnsupportedError
from nexusquant.hf.cache import checked_model
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.store_profiles import StoreProfileLike, matching_store_profile
from nexusquant.nxq import Reader
from nexusquant.prefix import coded
from nexusquant.prefix.arguments import path_of
from nexusquant.prefix.companion import held
from nexusquant.prefix.decoded import decode_prefix
from nexusquant.prefix.live import load_live
from nexusquant.prefix.payloads import PAYLOADS as LIVE_CODECS
from nexusquant.prefix.restore import live_cache, stock_cache
from nexusquant.stores import Store

T = TypeVar("T")
Place = str | Path | bytes | bytearray | memoryview | BinaryIO | Store


def load(
    place: Place,
    model: nn.Module,
    *,
    key: str | None = None,
    quality: str | CompressionConfig | None = None,
    profile: ProfileLike = None,
    store_profile: StoreProfileLike = None,
    report: Callable[[str], None] = lambda step: None,
) -> Any:
    """The cache that a prefix was saved from: pass it as `cache` and go on.

    Args:
        place: a path, the bytes of a file, an open binary file, or a store.
        key: in the store.
        quality: of an entropy-coded prefix: None gives a `DynamicCache` of transformers; a preset
            or config a `NexusCache` as of a prompt that was just read, but with queries like those
            of the storage profile in place of the prompt's. What was saved compressed
            ("raw", ...) comes back as it was.
        profile: of live caches, as for `NexusCache`.
        store_profile: of entropy-coded prefixes, or its file. Default: the one that it was coded
            with, of the user's cache directory, in the file or beside it in the store.

    Raises:
        FormatError: not an .nxq file, damaged, or none that this version reads.
        ProfileError: the profile that it was coded with is not there.
        StoreError: it cannot be read, or the store has no such key.
        UnsupportedError: it is another model's.
        ConfigError: arguments that do not fit together.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from nexusquant import NexusCache, load, save
        >>> cache = NexusCache(model, quality="high")
        >>> output = model.generate(input_ids, cache=cache, max_new_tokens=8)
        >>> with TemporaryDirectory() as folder:
        ...     saved = save(cache, f"{folder}/prefix.nxq")
        ...     again = load(saved.key, model)
        >>> again.nbytes == cache.nbytes
        True
    """
    if quality is not None:
        resolve_config(quality)
    elif profile is not None and store_profile is not None:
        raise ConfigError("profile= is of live caches, store_profile= of others: give one of them.")
    with open_prefix(place, key) as reader:
        return load_from(
            reader, model, place, quality=quality, profile=profile, store_profile=store_profile,
            report=report,
        )  # fmt: skip


def load_from(
    reader: Reader,
    model: nn.Module,
    place: Any = None,
    *,
    quality: str | CompressionConfig | None = None,
    profile: ProfileLike = None,
    store_profile: StoreProfileLike = None,
    report: Callable[[str], None] = lambda step: None,
) -> Any:
    """`load` of a prefix that is open.

    Args:
        place: where it is, for the profile beside it.
    """
    model = checked_model(model)
    check_model(reader, model)
    codec = reader.meta.get("codec")
    if not isinstance(codec, str) or codec not in (coded.NAME, *LIVE_CODECS):
        raise FormatError(
            f"codec {codec!r:.80} is not known: {coded.NAME}, {', '.join(LIVE_CODECS)} are."
        )
    if codec in LIVE_CODECS:
        for name, value in (("quality", quality), ("store_profile", store_profile)):
            if value is not None:
                raise ConfigError(
                    f"{name}=: this prefix was saved as it was compressed (codec {codec!r}): it has"
                    " its own quality and profile, leave them out."
                )
        cache = load_live(reader, model, profile, lambda x: held(reader, place, x), report)
        if reader.meta.get("tokens") != cache.get_seq_length():
            raise FormatError("the header has other tokens than the cache: damaged.")
        return cache
    if profile is not None and quality is None:
        raise ConfigError("profile= is of live caches: give quality=, too.")
    digest = reader.meta.get("profile")
    if not isinstance(digest, str):
        raise FormatError(f"the header's profile is {digest!r:.80}, no str.")
    known = matching_store_profile(
        model, digest, store_profile, lambda: held(reader, place, digest)
    )
    decoded = decode_prefix(reader, model, known, report)
    if quality is None:
        return stock_cache(decoded, model)
    return live_cache(decoded, model, known, quality, profile)


def open_prefix(place: Place, key: str | None = None) -> Reader:
    """An open prefix, of which only what is read is fetched.

    Raises:
        FormatError, StoreError, ConfigError: as `load` does.
    """
    if isinstance(place, Store):
        if key is None:
            raise ConfigError("a store holds many prefixes: give the key of one.")
        return Reader.open(_InStore(place, key), f"{place.where}: {key}")
    if key is not None:
        raise ConfigError("key is for stores; a file has its path.")
    return Reader.open(path_of(place) if isinstance(place, (str, Path)) else place)


def prefix_tokens(reader: Reader) -> list[int] | None:
    """Token ids of a prefix, None if it was saved without.

    Raises:
        FormatError: they are damaged.
    """
    if "tokens" not in reader.streams:
        return None
    data, tokens = bytes(reader.read("tokens", 0)), reader.meta.get("tokens")
    if type(tokens) is not int or len(data) != 4 * tokens:
        raise FormatError(f"{len(data)} bytes of token ids for {tokens!r:.80} tokens: damaged.")
    ids = array("I", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def check_model(reader: Reader, model: nn.Module) -> None:
    """Raises `UnsupportedError` unless the prefix is of this model."""
    theirs, mine = reader.meta.get("fingerprint"), fingerprint(model)
    if theirs != mine:
        raise UnsupportedError(
            f"this prefix is of another model: its fingerprint is {theirs!r:.40}"
            f" ({reader.meta.get('model_type')!r:.40}), this model's {mine!r}. Other weights, or"
            " the same in another dtype, have other keys and values."
        )


class _InStore:
    """A value of a store, read in ranges."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key

    def size(self) -> int:
        """Bytes."""
        return self._found(self._store.size(self._key))

    def read(self, start: int, stop: int) -> bytes:
        """A range of them."""
        return self._found(self._store.get_range(self._key, start, stop))

    def _found(self, found: T | None) -> T:
        if found is None:
            raise StoreError(f"{self._store.where} has no {self._key}.")
        return found
