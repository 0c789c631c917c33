"""What a `nexusquant_evict` block knows: its settings, and figures of the cache used last."""

from __future__ import annotations

from torch import nn

from nexusquant.accounting import CacheStats
from nexusquant.config import CompressionConfig
from nexusquant.errors import NexusQuantError
from nexusquant.hf.cache import cache_stats
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import ProfileBook, ProfileLike
from nexusquant.hf.transformers_private import Cache
from nexusquant.profile import Profile


class Run:
    """What `nexusquant_evict` yields: the settings and, afterwards, the figures.

    Attributes:
        config: the settings in force.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, given: ProfileLike) -> None:
        self.config, self.notices = config, Notices()
        self._given = given
        self._book: ProfileBook | None = self.book(model)  # complains before anything runs
        self._cache: Cache | None = None
        self._last: CacheStats | None = None

    def book(self, model: nn.Module) -> ProfileBook:
        """For a new cache."""
        return ProfileBook.of(model, self.config, self._given)

    @property
    def profile(self) -> Profile | None:
        """That of the cache used last, before the first one what it would be. Tokens from before it
        was there, as those of a short first turn, are coded without."""
        return None if self._book is None else self._book.profile

    @property
    def stats(self) -> CacheStats:
        """Measured size of the cache used last.

        Raises:
            NexusQuantError: no cache was used.
        """
        if self._cache is not None:
            self._last = cache_stats(self._cache)
        if self._last is None:
            raise NexusQuantError(
                "no cache was used inside this nexusquant_evict block: nothing ran yet, or the"
                " model ran without a cache (use_cache=False)."
            )
        return self._last

    def adopt(self, cache: Cache) -> None:
        """Remember the cache in use; the one before is measured and let go."""
        if cache is not self._cache:
            self.let_go()
            self._cache = cache
            compact = [layer for layer in cache.layers if isinstance(layer, CompactLayer)]
            self._book = compact[0].profiles if compact else None

    def let_go(self) -> None:
        """Measure the cache and drop it."""
        if self._cache is not None:
            self._last, self._cache = cache_stats(self._cache), None
