"""Profiles for our rows: calibrated on text that is not scored, each when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nexusquant import CompressionConfig, calibrate, calibrate_store
from nexusquant.entropy.profile import StoreProfile
from nexusquant.profile import Profile

Change = Callable[[], AbstractContextManager[None]]
PAGE = CompressionConfig.rope_page


class Profiles:
    """Of one model, by key frame and by what was changed in the statistics (ablations)."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Sequence[str], report: Callable[[str], None]
    ) -> None:
        self._model, self._tokenizer, self._texts = model, tokenizer, texts
        self._report = report
        self._made: dict[tuple[int, Change], Profile] = {}
        self._store: StoreProfile | None = None

    def get(self, rope_page: int = PAGE, change: Change = nullcontext) -> Profile:
        """The profile built while `change` is in force."""
        key = rope_page, change
        if key not in self._made:
            with change():
                self._made[key] = calibrate(
                    self._model, self._tokenizer, self._texts, rope_page=rope_page,
                    source="benchmark", report=lambda line: self._report(f"Calibrating: {line}"),
                )  # fmt: skip
        return self._made[key]

    def store(self) -> StoreProfile:
        """The storage profile."""
        if self._store is None:
            self._store = calibrate_store(
                self._model, self._tokenizer, self._texts, source="benchmark",
                report=lambda line: self._report(f"Calibrating for the store: {line}"),
            )  # fmt: skip
        return self._store

    @property
    def nbytes(self) -> int:
        """Of the largest; 0 if none was needed."""
        store = [] if self._store is None else [self._store]
        return max((profile.nbytes for profile in [*self._made.values(), *store]), default=0)
