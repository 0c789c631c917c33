"""Compares KV-cache compressors side by side: same model, same texts, one run.

    python -m benchmarks.compare MODEL --text FILE --calibrate FILE --json out.json --plot out.png

benchmarks/README.md says how every competitor's bytes are counted.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.calibrated import Profiles
from benchmarks.competitors import Competitor, NotRunnable
from benchmarks.field import FIELDS
from benchmarks.measure import Reference, Text, prepare
from benchmarks.original import Package
from benchmarks.plot import draw
from nexusquant import __version__
from nexusquant.demo import calibration_text, demo_text
from nexusquant.errors import NexusQuantError
from nexusquant.loading import demo_model, load_model
from nexusquant.progress import Steps, compile_kernels, progress_steps, quiet_transformers

PACKAGES = ("torch", "transformers", "optimum-quanto", "hqq", "matplotlib")


def main(
    model: Annotated[
        str, typer.Argument(help="Hub id, model folder, .gguf file, or 'demo' for SmolLM2-135M.")
    ] = "demo",
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to score; default: the demo's.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", help="UTF-8 text for our profile; default: more of Python's."),
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="nexusquant-kv's wheel, or the folder it was unpacked to.")
    ] = None,
    field: Annotated[str, typer.Option(help=f"Rows: {', '.join(FIELDS)}.")] = "competitors",
    only: Annotated[
        list[str] | None, typer.Option(help="Only competitors whose family or name has this.")
    ] = None,
    prefix: Annotated[int, typer.Option(min=64, help="Tokens compressed.")] = 1536,
    continuation: Annotated[int, typer.Option(min=8, help="Tokens scored.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of KL against ratio.")] = None,
) -> None:
    """Compares KV-cache compressors side by side: same model, same texts, one run."""
    console = Console(stderr=True)
    if field not in FIELDS:
        raise typer.BadParameter(f"{field}: must be one of {', '.join(FIELDS)}.")
    try:
        with progress_steps() as progress, quiet_transformers():
            result = run(
                progress, model, text or [], calibration or [], original, field, only or [],
                prefix, continuation, dtype, device,
            )  # fmt: skip
    except NexusQuantError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    out = Console()
    if not out.is_terminal:  # 80 columns by default, which would cut the figures off
        out = Console(width=140)
    out.print(table(result["summary"], result["title"]))
    for what, why in result["not_runnable"].items():
        out.print(f"not runnable: {what}: {why}", markup=False, highlight=False)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if plot and result["summary"]:
        try:
            draw(result["summary"], result["title"], plot)
        except ImportError as error:
            console.print(f"no plot: {error}", markup=False)


def run(
    progress: Steps,
    model_name: str,
    text_files: Sequence[Path],
    calibration_files: Sequence[Path],
    original: Path | None,
    field_name: str,
    only: Sequence[str],
    prefix: int,
    continuation: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Everything that goes into the result file."""
    folder = demo_model(progress.step) if model_name == "demo" else model_name
    progress.step(f"Loading {model_name}")
    model, tokenizer = load_model(folder, dtype, device)
    compile_kernels(progress, model)
    texts = _texts(tokenizer, text_files, prefix, continuation)
    package = Package(original) if original else None
    profiles = Profiles(model, tokenizer, _calibration_texts(calibration_files), progress.step)
    field = _chosen(FIELDS[field_name](profiles, package), only)
    rows: list[dict[str, Any]] = []
    not_runnable: dict[str, str] = {}
    for text in texts:
        progress.step(f"{text.name}: uncompressed")
        reference = Reference.of(model, text)
        for index, one in enumerate(field):
            label = f"{one.family}: {one.name}"
            if label in not_runnable:
                continue
            progress.step(f"{text.name} {index + 1}/{len(field)} {label}")
            start = time.perf_counter()
            try:
                score, prefilled = reference.run(one)
            except NotRunnable as error:
                not_runnable[label] = str(error)
                continue
            rows.append(
                {
                    "family": one.family, "name": one.name, "text": text.name,
                    "how": prefilled.how, "bits": prefilled.bits, "ratio": 16 / prefilled.bits,
                    "seconds": time.perf_counter() - start, **asdict(score),
                }
            )  # fmt: skip
    return {
        "title": f"{Path(model_name).name}, prefix {prefix}, continuation {continuation},"
        f" {len(texts)} text{'s'[: len(texts) > 1]}, {dtype} on {model.device.type}",
        "environment": environment(),
        "profile_bytes": profiles.nbytes,
        "texts": [text.name for text in texts],
        "summary": summarize(rows),
        "not_runnable": merge_reasons(not_runnable),
        "rows": rows,
    }


def _chosen(field: Sequence[Competitor], only: Sequence[str]) -> list[Competitor]:
    """Those whose label contains one of the words; all without words."""
    return [
        one
        for one in field
        if not only or any(word in f"{one.family}: {one.name}" for word in only)
    ]


def _texts(tokenizer: Any, files: Sequence[Path], prefix: int, continuation: int) -> list[Text]:
    sources = [(path.stem, path.read_text(encoding="utf-8")) for path in files]
    prepared = [
        prepare(tokenizer, name, body, prefix, continuation)
        for name, body in sources or [("demo", demo_text())]
    ]
    texts = [text for text in prepared if text is not None]
    if not texts:
        raise NexusQuantError(f"no text is long enough for {prefix} + {continuation} tokens.")
    return texts


def _calibration_texts(files: Sequence[Path]) -> list[str]:
    """The files, or help topics of Python that are not in the demo's text."""
    if files:
        return [path.read_text(encoding="utf-8") for path in files]
    return [calibration_text()]


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per competitor: means over the texts, the needle over those that knew it."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["name"]), []).append(row)
    summary = []
    for (family, name), group in groups.items():
        bits = fmean(row["bits"] for row in group)
        needles = [row["needle"] for row in group if not math.isnan(row["needle"])]
        summary.append(
            {
                "family": family, "name": name, "how": group[0]["how"],
                "bits": bits, "ratio": 16 / bits,
                "kl": fmean(row["kl"] for row in group),
                "perplexity_change": math.expm1(fmean(row["loss_change"] for row in group)),
                "top1": fmean(row["top1"] for row in group),
                "needle": fmean(needles) if needles else None,
            }
        )  # fmt: skip
    return summary


def merge_reasons(reasons: dict[str, str]) -> dict[str, str]:
    """One line per family where all of it fails for the same reason."""
    merged: dict[str, str] = {}
    for label, why in reasons.items():
        family = label.partition(":")[0]
        same = {w for other, w in reasons.items() if other.startswith(f"{family}:")}
        merged[family if len(same) == 1 else label] = why
    return merged


def table(summary: Sequence[dict[str, Any]], title: str) -> Table:
    """The summary for reading."""
    out = Table(title=title, title_justify="left")
    for name in ("competitor", "setting", "bytes"):
        out.add_column(name, no_wrap=True)
    for name in ("bits", "ratio", "KL", "dPPL %", "top-1", "needle"):
        out.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in summary:
        if previous not in (None, row["family"]):
            out.add_section()
        needle = "-" if row["needle"] is None else f"{row['needle']:.2f}"
        out.add_row(
            "" if previous == row["family"] else row["family"], row["name"], row["how"],
            f"{row['bits']:.3f}", f"{row['ratio']:.2f}", f"{row['kl']:.4f}",
            f"{100 * row['perplexity_change']:+.2f}", f"{row['top1']:.3f}", needle,
        )  # fmt: skip
        previous = row["family"]
    return out


def environment() -> dict[str, str]:
    installed = {one.name: one.version for one in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "nexusquant": __version__,
        **{name: installed.get(name, "not installed") for name in PACKAGES},
        "threads": str(torch.get_num_threads()),
    }


if __name__ == "__main__":
    typer.run(main)
