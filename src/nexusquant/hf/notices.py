"""Warnings about what stays uncompressed, each given once."""

from __future__ import annotations

import warnings

from nexusquant.errors import NexusQuantWarning

__all__ = ["NexusQuantWarning", "Notices"]


class Notices:
    """Warnings of one cache, each message given once."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, message: str) -> None:
        """Warn unless this cache already did."""
        if message not in self.given:
            self.given.add(message)
            warnings.warn(message, NexusQuantWarning, stacklevel=2)
