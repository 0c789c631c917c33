"""`nexusquant evaluate` and `nexusquant presets`: what the presets are and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nexusquant.cli.common import Device, Dtype, Model, folder, read
from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from nexusquant.config import CompressionConfig


def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to score; repeatable.", allow_dash=True)
    ] = None,
    quality: Annotated[list[str] | None, typer.Option(help="Preset; repeatable.")] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")] = 1536,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens scored behind them.")] = 512,
    decode: Annotated[
        int, typer.Option(min=0, help="Also feed this many tokens one by one: time and ratio.")
    ] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure presets on real text: KL from the uncompressed model, perplexity, ratio.

    Without --text the text is the Python language reference that every Python carries.
    """
    from nexusquant import demo as lab
    from nexusquant.cli.tables import decoding_table, divergence_table
    from nexusquant.config import resolve_config
    from nexusquant.evaluate import DEFAULT_PRESETS, decoding, divergence
    from nexusquant.loading import load_model
    from nexusquant.progress import progress_steps, quiet_transformers

    presets = quality or list(DEFAULT_PRESETS)
    configs = {name: resolve_config(name) for name in presets}
    if decode > continuation:
        raise ConfigError(f"--decode {decode}: at most --continuation {continuation}.")
    texts = {str(path): read(path) for path in text or []} or {
        "language reference": lab.demo_text()
    }
    with quiet_transformers(), progress_steps() as progress:
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        results, decoded = [], []
        for name, content in texts.items():
            ids = tokenizer(content, return_tensors="pt").input_ids[:, : prefix + continuation]
            if ids.shape[1] < prefix + continuation:
                raise ConfigError(
                    f"{name}: {ids.shape[1]} tokens are fewer than --prefix {prefix} +"
                    f" --continuation {continuation}."
                )
            for preset, config in configs.items():
                progress.step(f"{name}: {preset}")
                result = divergence(network, ids.to(network.device), prefix, config)
                results.append((preset, name, result))
        baseline: dict[str, CompressionConfig | None] = {"uncompressed": None}
        for name, config_or_none in (baseline | configs).items() if decode else ():
            progress.step(f"decoding: {name}")
            steps = ids[:, : prefix + decode].to(network.device)
            decoded.append((name, decoding(network, steps, prefix, config_or_none)))
    title = f"{model}, {prefix} tokens compressed, {continuation} scored"
    Console().print(divergence_table(results, title))
    if decoded:
        title = f"{model}, {decode} tokens one by one behind {prefix}"
        Console().print(decoding_table(decoded, title))


def presets() -> None:
    """Show the presets and what they set."""
    from dataclasses import fields

    from rich.table import Table

    from nexusquant.config import PRESETS, CompressionConfig

    names: dict[CompressionConfig, list[str]] = {}
    for name, config in PRESETS.items():
        names.setdefault(config, []).append(name)
    table, shared = Table(), []
    table.add_column("field")
    for same in names.values():
        table.add_column("\n".join(same), justify="right")
    for field in fields(CompressionConfig):
        values = [str(getattr(config, field.name)) for config in names]
        if len(set(values)) > 1:
            table.add_row(field.name, *values)
        else:
            shared.append(f"{field.name}={values[0]}")
    Console().print(table)
    typer.echo(f"in all of them: {', '.join(shared)}")
    typer.echo("any field can be changed: nexusquant generate ... --set evict_ratio=0.5")
