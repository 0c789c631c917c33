"""The measurements of `nexusquant evaluate`: every quality on every text, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from nexusquant.config import CompressionConfig
    from nexusquant.evaluate import Decoding, Divergence, Drift, NeedleGrid
    from nexusquant.progress import Steps

N = TypeVar("N", int, float)


def numbers(text: str, option: str, kind: Callable[[str], N]) -> list[N]:
    """`"1024,2048"` to numbers. Raises `ConfigError` naming the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: must be numbers with commas between them.") from error


@dataclass
class Bench:
    """One loaded model, the texts and the qualities to measure it with."""

    model: Any
    tokenizer: Any
    texts: dict[str, str]
    configs: dict[str, CompressionConfig]
    progress: Steps

    def __post_init__(self) -> None:
        self.ids: dict[str, Tensor] = {
            name: self.tokenizer(text, return_tensors="pt").input_ids
            for name, text in self.texts.items()
        }

    def need(self, tokens: int, wanted: str) -> None:
        """Texts that long, and a warning if the model was not made for it.

        Raises:
            ConfigError: a text has fewer than `tokens` tokens.
        """
        from nexusquant.demo import context_limit

        for name, ids in self.ids.items():
            if ids.shape[1] < tokens:
                raise ConfigError(f"{name}: {ids.shape[1]} tokens are fewer than {wanted}.")
        limit = context_limit(self.model)
        if limit is not None and tokens > limit:
            typer.echo(
                f"warning: {wanted} is more than the {limit} tokens this model was made for.",
                err=True,
            )

    def _first(self, name: str, tokens: int) -> Tensor:
        """The first tokens of a text, (1, tokens) on the model's device."""
        ids: Tensor = self.ids[name][:, :tokens].to(self.model.device)
        return ids

    def divergences(self, prefix: int, continuation: int) -> list[tuple[str, str, Divergence]]:
        """(quality, text, divergence)."""
        from nexusquant.evaluate import divergence

        results = []
        for name in self.texts:
            ids = self._first(name, prefix + continuation)
            for preset, config in self.configs.items():
                self.progress.step(f"{name}: {preset}")
                results.append((preset, name, divergence(self.model, ids, prefix, config)))
        return results

    def decodings(self, prefix: int, steps: int) -> list[tuple[str, Decoding]]:
        """(quality, decoding) on the first text, the uncompressed cache first."""
        from nexusquant.evaluate import decoding

        results = []
        ids = self._first(next(iter(self.texts)), prefix + steps)
        baseline: dict[str, CompressionConfig | None] = {"uncompressed": None}
        for name, config in (baseline | self.configs).items():
            self.progress.step(f"decoding: {name}")
            results.append((name, decoding(self.model, ids, prefix, config)))
        return results

    def drifts(self, prefix: int, steps: int) -> list[tuple[str, str, Drift]]:
        """(quality, text, drift)."""
        from nexusquant.evaluate import drift

        results = []
        for name in self.texts:
            ids = self._first(name, prefix + steps)
            for preset, config in self.configs.items():
                label = f"{name}: {preset}, decoding"
                self.progress.step(f"{label} {steps:,} tokens")

                def report(step: str, label: str = label) -> None:
                    self.progress.tick(f"{label}: {step}")

                buckets = min(8, steps)
                found = drift(
                    self.model, ids, prefix, config, steps=steps, buckets=buckets, report=report
                )
                results.append((preset, name, found))
        return results

    def needles_fit(self, lengths: Sequence[int], depths: Sequence[float], rounds: int) -> None:
        """Raises `ConfigError` if `needles` would, before anything else is measured."""
        from nexusquant.evaluate.haystacks import needle_prompts

        needle_prompts(self.tokenizer, self.texts.values(), lengths, depths, rounds)

    def needles(
        self, lengths: Sequence[int], depths: Sequence[float], rounds: int
    ) -> list[tuple[str, NeedleGrid]]:
        """(quality, grid) over all texts."""
        from nexusquant.evaluate import needles

        grids = needles(
            self.model, self.tokenizer, self.texts.values(), list(self.configs),
            lengths=lengths, depths=depths, rounds=rounds,
            report=lambda step: self.progress.step(f"codes: {step}"),
        )  # fmt: skip
        return list(zip(self.configs, grids, strict=True))
