"""Measurements as tables that line up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from nexusquant.evaluate import Decoding, Divergence


def divergence_table(results: Sequence[tuple[str, str, Divergence]], title: str) -> Table:
    """A table of (preset, text, divergence) rows, with the mean per preset where texts differ."""
    table = Table(title=title, title_justify="left")
    table.add_column("quality")
    table.add_column("text")
    for name in ("bits", "ratio", "KL", "dPPL %", "top-1"):
        table.add_column(name, justify="right")

    def row(preset: str, text: str, group: Sequence[Divergence]) -> None:
        bits = mean(r.stats.bits_per_element for r in group)
        change = math.expm1(mean(r.loss - r.full_loss for r in group))
        table.add_row(
            preset, text, f"{bits:.3f}", f"{16 / bits:.2f}", f"{mean(r.kl for r in group):.4f}",
            f"{100 * change:+.2f}", f"{mean(r.top1 for r in group):.3f}",
        )  # fmt: skip

    for preset in dict.fromkeys(name for name, _, _ in results):
        mine = [(text, result) for name, text, result in results if name == preset]
        for text, result in mine:
            row(preset, text, [result])
        if len(mine) > 1:
            row(preset, "mean", [result for _, result in mine])
    return table


def decoding_table(results: Sequence[tuple[str, Decoding]], title: str) -> Table:
    """A table of (quality, decoding) rows; the first row is the uncompressed baseline."""
    table = Table(title=title, title_justify="left")
    table.add_column("quality")
    for name in ("prefill s", "step ms", "ratio after prefill", "ratio after steps"):
        table.add_column(name, justify="right")
    for quality, result in results:
        table.add_row(
            quality, f"{result.prefill_seconds:.2f}", f"{1000 * result.step_seconds:.1f}",
            f"{result.after_prefill.compression_ratio:.2f}",
            f"{result.after_steps.compression_ratio:.2f}",
        )  # fmt: skip
    return table
