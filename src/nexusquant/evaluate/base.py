"""What all measurements share: how a quality is named, and what input they take."""

from __future__ import annotations

from torch import Tensor

from nexusquant.config import CompressionConfig
from nexusquant.errors import ConfigError

Quality = str | CompressionConfig
DEFAULT_PRESETS = ("lossless", "high", "balanced", "max")


def check_prefix(input_ids: Tensor, prefix: int, behind: int) -> None:
    """Raises `ConfigError` unless one row holds `behind` tokens behind the prefix."""
    if input_ids.ndim != 2 or len(input_ids) != 1 or not 0 < prefix <= input_ids.shape[1] - behind:
        raise ConfigError(
            f"need input_ids of one row with at least {behind} tokens behind the prefix of"
            f" {prefix}; got shape {tuple(input_ids.shape)}."
        )
