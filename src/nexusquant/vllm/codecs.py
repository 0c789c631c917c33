"""Codecs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nexusquant.errors import ConfigError
from nexusquant.vllm.blocks import BlockCodec, RawCodec
from nexusquant.vllm.e8 import E8Codec
from nexusquant.vllm.profiles import Served, entropy_codec

CODECS: dict[str, Callable[..., BlockCodec]] = {
    "raw": lambda served, **options: RawCodec(**options),
    "e8": lambda served, **options: E8Codec(**options),
    "entropy": entropy_codec,
}
"""Each made from what a server runs and options."""


def make_codec(name: str, options: Mapping[str, Any], served: Served | None = None) -> BlockCodec:
    """The codec of a name.

    Args:
        options: arguments of the codec, `bits` of e8 for one.
        served: what `entropy` has to know of the server.

    Raises:
        ConfigError: unknown name or option; lists the known names.
        UnsupportedError, ProfileError: see `entropy_codec`.
    """
    if not isinstance(name, str) or name not in CODECS:
        raise ConfigError(f"codec {name!r}: must be one of {', '.join(CODECS)}.")
    if not isinstance(options, Mapping):
        raise ConfigError(f'codec_options={options!r}: must be an object, such as {{"bits": 6}}.')
    try:
        return CODECS[name](served, **options)
    except TypeError as error:
        raise ConfigError(f"codec_options {dict(options)} of codec {name!r}: {error}.") from error
