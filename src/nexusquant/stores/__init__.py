"""Where compressed prefixes are kept: directories, Redis, and what fsspec opens."""

from __future__ import annotations

from pathlib import Path
from types import NoneType

from nexusquant.errors import ConfigError
from nexusquant.stores import urls
from nexusquant.stores.base import Store, need
from nexusquant.stores.directory import DirectoryStore
from nexusquant.stores.fsspec_store import FsspecStore
from nexusquant.stores.redis_store import RedisStore

__all__ = ["DirectoryStore", "FsspecStore", "RedisStore", "Store", "open_store"]

_REDIS = ("redis", "rediss", "unix")
_OWN_REDIS = ("ttl", "renew", "prefix", "timeout")


def open_store(
    place: str | Path, *, max_bytes: int | str | None = None, ttl: int | str | None = None
) -> Store:
    """The store at a place.

    | place | store | options |
    |---|---|---|
    | path, `file://` | `DirectoryStore` | `max_bytes`, `sync` |
    | `redis://`, `rediss://`, `unix://` | `RedisStore` | `ttl`, `renew`, `prefix`, `timeout` |
    | other `scheme://` | `FsspecStore` | |

    Options can stand behind a `?` (`/var/cache/kv?max_bytes=2GiB`, `redis://host/0?ttl=3600`), for
    Redis also `db` and the `ssl_...` options of redis-py; a `Path` is taken as it is.

    Raises:
        ConfigError: no such place, or an option that this store does not have.
        StoreError: it cannot be opened, or a package is missing.
    """
    if not isinstance(place, (str, Path)):
        raise ConfigError(f"{place!r} is not a place: give a path or a URL.")
    options: dict[str, str] = {}
    scheme, url = "", str(place)
    if isinstance(place, str):
        url, options = urls.split_options(place)
        scheme = urls.scheme_of(url)
        if not scheme:
            urls.refuse_typo(url)
    for name, value in (("max_bytes", max_bytes), ("ttl", ttl)):
        need(type(value) in (int, str, NoneType), name, value, "an integer, or text")
        if value is not None and options.setdefault(name, str(value)) != str(value):
            raise ConfigError(f"{name}={value}, but the place says {name}={options[name]}.")
    if scheme in ("", "file"):
        _only(place, options, "max_bytes", "sync")
        path = urls.path_of_file_url(url) if scheme else url
        limit = urls.parse_size(options["max_bytes"]) if "max_bytes" in options else None
        return DirectoryStore(path, limit, sync=urls.parse_flag(options, "sync"))
    if scheme in _REDIS:
        _only(place, options, *_OWN_REDIS, "db", *(x for x in options if x.startswith("ssl_")))
        theirs = {name: text for name, text in options.items() if name not in _OWN_REDIS}
        return RedisStore(
            urls.join_options(url, theirs),
            urls.parse_seconds(options["ttl"]) if "ttl" in options else None,
            options.get("prefix", "nexusquant:"),
            renew=urls.parse_flag(options, "renew"),
            timeout=urls.parse_seconds(options.get("timeout", "10")),
        )
    _only(place, options)
    return FsspecStore(url)


def _only(place: str | Path, options: dict[str, str], *allowed: str) -> None:
    if unknown := sorted(options.keys() - set(allowed)):
        raise ConfigError(
            f"{urls.without_password(str(place))} has no option {', '.join(unknown)}: it takes"
            f" {', '.join(sorted(allowed)) or 'none'}."
        )
