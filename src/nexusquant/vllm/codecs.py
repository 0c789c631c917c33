"""Codecs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nexusquant.errors import ConfigError
from nexusquant.vllm.blocks import BlockCodec, RawCodec
from nexusquant.vllm.e8 import E8Codec

CODECS: dict[str, Callable[..., BlockCodec]] = {"raw": RawCodec, "e8": E8Codec}


def make_codec(name: str, options: Mapping[str, Any]) -> BlockCodec:
    """The codec of a name.

    Args:
        options: arguments of the codec, `bits` of e8 for one.

    Raises:
        ConfigError: unknown name or option; lists the known names.
    """
    if name not in CODECS:
        raise ConfigError(f"codec {name!r}: must be one of {', '.join(CODECS)}.")
    try:
        return CODECS[name](**options)
    except TypeError as error:
        raise ConfigError(f"codec_options {dict(options)} of codec {name!r}: {error}.") from error
