"""Where a store is, as text: URLs with options."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote, urlencode

from nexusquant.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", 1)
    for ending, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def split_options(url: str) -> tuple[str, dict[str, str]]:
    """`PLACE?name=value&...` as the place and its options."""
    place, _, query = url.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:  # which quotes what may be part of a password
        raise ConfigError(
            f"{without_password(url)}: what follows the `?` must be name=value&name=value."
        ) from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ConfigError(f"{without_password(url)}: an option is given twice.")
    return place, options


def join_options(place: str, options: dict[str, str]) -> str:
    """Inverse of `split_options`."""
    return f"{place}?{urlencode(options)}" if options else place


def scheme_of(url: str) -> str:
    """What stands before `://`, in lower case; empty for a path."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator and re.fullmatch(r"[A-Za-z][\w.+:-]*", scheme) else ""


def path_of_file_url(url: str) -> str:
    """The path of a `file://` URL."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not path:
        raise ConfigError(
            f"{without_password(url)}: write file:///absolute/path, or the path alone."
        )
    return unquote(slash + path)


def refuse_typo(path: str) -> None:
    """Refuse `redis:/host`, which would be a folder `redis:`, unless it is there."""
    word, colon, _ = path.partition("/")[0].partition(":")
    there = "\0" not in path and os.access(path, os.F_OK)
    if colon and len(word) > 1 and not there:  # the rest is not shown: perhaps a password
        raise ConfigError(
            f"{word}: without `//` behind it is no URL: write redis://host:port/db,"
            " file:///absolute/path or, for a folder of such a name, ./ before it."
        )


def name_of_redis(url: str) -> str:
    """What messages call a database of Redis."""
    name, (place, options) = without_password(url), split_options(url)
    match = re.fullmatch(r"rediss?://[^/]*(?:/(\d*))?|unix://(?:[^/]*@)?/.+", place)
    if match is None:
        raise ConfigError(
            f"{name} is not a URL of Redis: give redis://host:port/db, rediss://host:port/db or"
            " unix:///path?db=0, and in a password %2F for a slash."
        )
    if match[1] and "db" in options:
        raise ConfigError(f"{name} says db={options['db']}, too: give one database.")
    return f"{name}?db={options['db']}" if "db" in options else name


def parse_size(text: str | int) -> int:
    """`"2GiB"`, `"500MB"` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:I?B)?)", str(text).strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if not 1 <= size < 2**60:
        raise ConfigError(f"max_bytes={text}: must be a size such as 2GiB or 500MB.")
    return size


def parse_seconds(text: str) -> int:
    """`"3600"` as a number."""
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()):
        raise ConfigError(f"{text!r} is no time: give whole seconds.")
    return int(text)


def parse_flag(options: dict[str, str], name: str) -> bool:
    """`true` or `false`; true if it is not given."""
    text = options.get(name, "true").lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{name}={text}: must be true or false.")
    return text == "true"


def without_password(url: str) -> str:
    """For messages: the URL without user, password, which may have any of `/?#@`, and options."""
    scheme, separator, rest = str(url).partition("://")
    if re.match(r"[^/?#]*[:@]", rest):
        rest = rest.rpartition("@")[2]
    return f"{scheme}{separator}{rest}".partition("?")[0]
