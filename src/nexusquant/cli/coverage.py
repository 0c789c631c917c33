"""`nexusquant models` and `nexusquant doctor`: what is compressed of which model, and why not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nexusquant.cli.common import Model, folder
from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from nexusquant.hf.coverage import Coverage

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_SHOWN = ("lossless", "high", "balanced", "max")

Json = Annotated[Path | None, typer.Option("--json", help="Also write this as a JSON file.")]


def models(
    only: Annotated[str, typer.Option(help="Only types whose name contains this.")] = "",
    json_file: Json = None,
) -> None:
    """Print every causal LM type of the installed transformers and what is compressed of it."""
    import transformers
    from rich.console import Console
    from rich.table import Table

    from nexusquant.cli.record import check_writable, write_json
    from nexusquant.hf.coverage import cover_types
    from nexusquant.progress import quiet_transformers

    if json_file is not None:
        check_writable(json_file)
    with quiet_transformers():  # default configs are not all consistent
        found = {name: cover for name, cover in cover_types().items() if only in name}
    if not found:
        raise ConfigError(f"--only {only}: no causal LM type of this transformers has that name.")
    table = Table("type", "cache", "what is different")
    for name, coverage in found.items():
        table.add_row(name, coverage.status, coverage.reasons)
    console = Console()
    console.print(table)
    counts = Counter(coverage.status for coverage in found.values())
    console.print(
        f"transformers {transformers.__version__}, {len(found)} types, by their default configs: "
        + ", ".join(f"{count} {status}" for status, count in counts.most_common())
    )
    if json_file is not None:
        write_json(json_file, {"transformers": transformers.__version__, "types": found})


def doctor(
    model: Model,
    memory: Annotated[str, typer.Option(help="For the cache: 8GiB, 500MB, ...")] = "8GiB",
    json_file: Json = None,
) -> None:
    """Say what will be compressed of a model, from its config alone, and how far memory reaches."""
    import transformers
    from rich.console import Console

    from nexusquant.cli.record import check_writable, write_json
    from nexusquant.hf.coverage import cover
    from nexusquant.hf.transformers_private import TESTED
    from nexusquant.loading import load_config
    from nexusquant.progress import progress_steps, quiet_transformers

    if json_file is not None:
        check_writable(json_file)
    budget = parse_bytes(memory)
    with quiet_transformers(), progress_steps() as progress:
        coverage = cover(load_config(folder(model, progress)))
    console = Console()
    for line in _summary(model, coverage):
        console.print(line, markup=False, highlight=False)
    if not coverage.refused:
        console.print(_sizes(coverage, budget, memory))
    console.print(f"transformers {transformers.__version__}; {TESTED}", highlight=False)
    if json_file is not None:
        write_json(json_file, {"model": model, "coverage": coverage})


def parse_bytes(text: str) -> int:
    """`"8GiB"` to bytes.

    Raises:
        ConfigError: not a number with a unit.
    """
    compact = text.replace(" ", "").upper()
    number = compact.rstrip("KMGTIB")
    try:
        value = float(number) * _UNITS.get(compact[len(number) :], 0)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**60:
        raise ConfigError(f"--memory {text}: must be a size such as 8GiB or 500MB.")
    return int(value)


def _summary(name: str, coverage: Coverage) -> list[str]:
    if coverage.refused:
        return [f"{name} ({coverage.model_type}): {coverage.refused}. Nothing can be compressed."]
    lines = [f"{name} ({coverage.model_type}): {coverage.status}"]
    groups: dict[Any, int] = {}
    for layer in coverage.layers:
        groups[layer] = groups.get(layer, 0) + 1
    for layer, count in groups.items():
        window = "" if layer.window is None else f", window of {layer.window:,}"
        dims = f"{layer.key_dim}"
        if layer.value_dim != layer.key_dim:
            dims += f" (keys) and {layer.value_dim} (values)"
        shape = f", {layer.kv_heads} KV heads of {dims}{window}" if layer.elements else ""
        why = f": {layer.reason}" if layer.reason else ""
        lines.append(f"  {count} x {layer.kind}{shape}: {layer.treatment}{why}")
    return lines


def _sizes(coverage: Coverage, budget: int, memory: str) -> Table:
    from rich.table import Table

    from nexusquant.config import PRESETS
    from nexusquant.hf.expected import expected_bytes, longest_context

    tokens = min(coverage.positions or 8192, 8192)
    title = f"expected, one sequence of {tokens:,} tokens, 16-bit model"
    table = Table(title=title, title_justify="left")
    table.add_column("quality")
    for column in ("bytes per token", "smaller", f"tokens in {memory}"):
        table.add_column(column, justify="right")
    plain = expected_bytes(None, coverage.layers, tokens)
    for quality in (None, *_SHOWN):
        config = None if quality is None else PRESETS[quality]
        size = expected_bytes(config, coverage.layers, tokens)
        fits = longest_context(config, coverage.layers, budget)
        table.add_row(
            quality or "uncompressed", f"{size / tokens:,.0f}",
            f"{plain / size:.1f}x" if size else "-", "any" if fits is None else f"{fits:,}",
        )  # fmt: skip
    limit = coverage.positions
    table.caption = f"made for up to {limit:,} positions" if limit else None
    return table
