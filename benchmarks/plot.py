"""Plots: KL against compression ratio, one line per family; times by context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

MARKERS = "oosD^v<>PX*hd"


def draw(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG of points with `family`, `name`, `ratio` and `kl`, both axes logarithmic.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    families = list(dict.fromkeys(point["family"] for point in points))
    for index, family in enumerate(families):
        mine = sorted((p for p in points if p["family"] == family), key=lambda p: p["ratio"])
        ours = family.startswith("ours")
        curve = len({f"{p['ratio']:.2f}" for p in mine}) == len(mine)  # else variants at one rate
        axes.plot(
            [p["ratio"] for p in mine], [p["kl"] for p in mine],
            marker=MARKERS[index % len(MARKERS)], markersize=6, label=family,
            color=pyplot.get_cmap("tab20")(index % 20),
            linewidth=2 if ours else 1, linestyle="-" if curve else "none",
        )  # fmt: skip
        if family == "ours, presets":
            for point in mine:
                axes.annotate(
                    point["name"], (point["ratio"], point["kl"]), xytext=(5, -11),
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("compression ratio, 16 / bits per element (log)")
    axes.set_ylabel("KL(full || compressed), nats per token (log)")
    axes.set_xticks([2, 3, 4, 6, 8, 12, 16, 24, 32])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_times(rows: Sequence[dict[str, Any]], name: str, y: str, label: str, path: Path) -> None:
    """Writes a PNG of `y` by `tokens`, one line per `name`, both axes logarithmic.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for index, what in enumerate(dict.fromkeys(row[name] for row in rows)):
        mine = sorted((row for row in rows if row[name] == what), key=lambda row: row["tokens"])
        axes.plot(
            [row["tokens"] for row in mine], [row[y] for row in mine], label=what,
            marker=MARKERS[index % len(MARKERS)], color=pyplot.get_cmap("tab20")(index % 20),
            linestyle="--" if what.startswith(("SDPA", "memcpy", "uncompressed")) else "-",
        )  # fmt: skip
    lengths = sorted({row["tokens"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens (log)", ylabel=f"{label} (log)")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(
    result: Annotated[Path, typer.Argument(help="JSON written by benchmarks.compare.")],
    png: Annotated[Path, typer.Argument(help="Where the picture goes.")],
) -> None:
    """Draws a stored result again."""
    stored = json.loads(result.read_text(encoding="utf-8"))
    draw(stored["summary"], stored["title"], png)


if __name__ == "__main__":
    typer.run(main)
