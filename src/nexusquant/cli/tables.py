"""Measurements as tables that line up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nexusquant.evaluate import Decoding, Divergence, Drift, NeedleGrid

_HEAT = ((0.95, "green"), (0.8, "yellow"), (0.5, "dark_orange"), (0.0, "red"))


def divergence_table(results: Sequence[tuple[str, str, Divergence]], title: str) -> Table:
    """A table of (preset, text, divergence) rows, with the mean per preset where texts differ."""
    table = Table(title=title, title_justify="left")
    table.add_column("quality")
    table.add_column("text")
    for name in ("KL", "p99.9", "top-1", "dPPL %", "ratio", "at the end"):
        table.add_column(name, justify="right")

    def row(preset: str, text: str, group: Sequence[Divergence]) -> None:
        prompt, end = (
            mean(getattr(r, at).bits_per_element for r in group) for at in ("stats", "final")
        )
        change = math.expm1(mean(r.loss - r.full_loss for r in group))
        table.add_row(
            preset, text, f"{mean(r.kl for r in group):.4f}", f"{mean(r.p999 for r in group):.2f}",
            f"{mean(r.top1 for r in group):.3f}", f"{100 * change:+.2f}", f"{16 / prompt:.2f}",
            f"{16 / end:.2f}",
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


def needle_table(grid: NeedleGrid) -> Table:
    """Share of the known answer tokens that are kept: depths down, lengths across, as heat."""
    table = Table()
    table.add_column("depth", justify="right")
    for length, ratio in grid.ratios.items():
        table.add_column(f"{length:,}\n{ratio:.1f}x", justify="right")
    for depth in sorted({cell.depth for cell in grid.cells}):
        row = [cell.share for cell in grid.cells if cell.depth == depth]
        table.add_row(f"{depth:.2f}", *map(_heat, row))
    table.add_section()
    columns = [[cell for cell in grid.cells if cell.length == length] for length in grid.ratios]
    known = [sum(cell.known for cell in column) for column in columns]
    asked = [sum(cell.asked for cell in column) for column in columns]
    kept = [sum(cell.kept for cell in column) for column in columns]
    shares = [k / n if n else math.nan for k, n in zip(kept, known, strict=True)]
    table.add_row("all", *map(_heat, shares))
    table.add_row("known", *(f"{n} of {m}" for n, m in zip(known, asked, strict=True)))
    return table


def _heat(share: float) -> Text:
    """A share in the colour of its value; a dash where there is nothing to keep."""
    if math.isnan(share):
        return Text("-")
    return Text(f"{share:.2f}", style=next(colour for least, colour in _HEAT if share >= least))


def drift_table(results: Sequence[tuple[str, Drift]]) -> Table:
    """A column per (quality, drift): KL down the decoded tokens, then with those kept exact."""
    table = Table()
    table.add_column("decoded token")
    for quality, _ in results:
        table.add_column(quality, justify="right")
    drifts = [result for _, result in results]
    rows = list(zip(*(drift.buckets for drift in drifts), strict=True))
    for row in rows:
        table.add_row(f"{row[0].start + 1:,}-{row[0].stop:,}", *(f"{b.kl:.4f}" for b in row))
    table.add_row("last / first", *(f"{drift.slope:.2f}" for drift in drifts))
    table.add_section()
    table.add_row("kept exact:")
    for row in rows:
        span = f"{row[0].start + 1:,}-{row[0].stop:,}"
        table.add_row(span, *(f"{b.prefill_kl:.4f}" for b in row))
    table.add_row("last / first", *(f"{drift.prefill_slope:.2f}" for drift in drifts))
    table.add_section()
    for label, size in (("ratio before", "after_prefill"), ("ratio at the end", "after_steps")):
        ratios = [getattr(drift, size).compression_ratio for drift in drifts]
        table.add_row(label, *(f"{ratio:.2f}" for ratio in ratios))
    return table
