"""`nexusquant evaluate` and `nexusquant presets`: what the presets are and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nexusquant.cli.common import Device, Dtype, Model, folder, read
from nexusquant.cli.profiles import ProfileOption, check_profile, prepare_profile
from nexusquant.cli.record import check_writable, write_json
from nexusquant.cli.runs import Bench, numbers
from nexusquant.errors import ConfigError


def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to score; repeatable.", allow_dash=True)
    ] = None,
    quality: Annotated[list[str] | None, typer.Option(help="Preset; repeatable.")] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")] = 1536,
    continuation: Annotated[
        int, typer.Option(min=2, help="Tokens decoded behind them, and scored.")
    ] = 320,
    decode: Annotated[
        int, typer.Option(min=0, help="Also time this many tokens, beside the stock cache.")
    ] = 0,
    drift: Annotated[
        int,
        typer.Option(min=0, help="Also decode this many tokens (2000, say): KL along them."),
    ] = 0,
    needles: Annotated[
        bool, typer.Option("--needles", help="Also ask for codes hidden in the text.")
    ] = False,
    lengths: Annotated[str, typer.Option(help="--needles: tokens of the prefixes.")] = "1024,2048",
    depths: Annotated[
        str, typer.Option(help="--needles: where the codes are, 0 to 1.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    rounds: Annotated[int, typer.Option(min=1, help="--needles: prefixes per length.")] = 2,
    json: Annotated[
        Path | None, typer.Option(help="Write all results of this run to a file.")
    ] = None,
    profile: ProfileOption = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure presets on real text, as a user meets them: a prompt, then token by token.

    KL is from the uncompressed model on the same tokens, in nats; p99.9 its 99.9th percentile. The
    ratio at the end counts what was decoded, and every byte.

    Without --text the text is from the Python language reference that every Python carries; so is
    the text of the profile, other parts of it, if none is stored (`nexusquant calibrate`).
    """
    sizes, places = numbers(lengths, "--lengths", int), numbers(depths, "--depths", float)
    if decode > continuation:
        raise ConfigError(f"--decode {decode}: at most --continuation {continuation}.")
    if drift == 1:
        raise ConfigError("--drift 1: needs at least 2 tokens to compare.")
    check_profile(profile)
    if json is not None:
        check_writable(json)
    from nexusquant import __version__
    from nexusquant import demo as lab
    from nexusquant.cli.tables import (
        decoding_table,
        divergence_table,
        drift_table,
        needle_table,
    )
    from nexusquant.config import resolve_config
    from nexusquant.evaluate import DEFAULT_PRESETS
    from nexusquant.loading import load_model
    from nexusquant.progress import compile_kernels, progress_steps, quiet_transformers

    configs = {name: resolve_config(name) for name in quality or DEFAULT_PRESETS}
    texts = {str(path): read(path) for path in text or []} or {
        "language reference": lab.demo_text()
    }
    with quiet_transformers(), progress_steps() as progress:
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        compile_kernels(progress, network)
        bench = Bench(network, tokenizer, texts, configs, progress)
        prepare_profile(network, tokenizer, configs.values(), profile, progress)
        bench.need(prefix + continuation, f"--prefix {prefix} + --continuation {continuation}")
        if drift:
            bench.need(prefix + drift, f"--prefix {prefix} + --drift {drift}")
        if needles:
            bench.need(max(sizes), f"--lengths {lengths}")
            bench.needles_fit(sizes, places, rounds)
        divergences = bench.divergences(prefix, continuation)
        decodings = bench.decodings(prefix, decode) if decode else []
        drifts = bench.drifts(prefix, drift) if drift else []
        grids = bench.needles(sizes, places, rounds) if needles else []
    console = Console()
    title = f"{model}, prompt of {prefix} tokens, {continuation} decoded behind it"
    console.print(divergence_table(divergences, title))
    if decodings:
        title = f"{model}, {decode} tokens one by one behind {prefix}"
        console.print(decoding_table(decodings, title))
    for name in texts if drifts else ():
        typer.echo(f"{name}: KL along {drift} tokens decoded one by one behind {prefix}")
        console.print(drift_table([(preset, each) for preset, of, each in drifts if of == name]))
    for preset, grid in grids:
        typer.echo(f"{preset}: share of the hidden codes still found, by depth and prefix length")
        console.print(needle_table(grid))
    if json is not None:
        keys = ("quality", "text", "result")
        results = {
            "nexusquant": __version__, "model": model, "dtype": network.dtype,
            "device": network.device, "prefix": prefix, "continuation": continuation,
            "configs": configs,
            "divergence": [dict(zip(keys, row, strict=True)) for row in divergences],
            "decoding": [{"quality": name, "result": each} for name, each in decodings],
            "drift": [dict(zip(keys, row, strict=True)) for row in drifts],
            "needles": [{"quality": name, "result": each} for name, each in grids],
        }  # fmt: skip
        write_json(json, results)


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
