"""The `nexusquant` command. torch and transformers load inside the commands that need them."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nexusquant.cli.answer import demo, generate
from nexusquant.cli.calibrate import calibrate
from nexusquant.cli.coverage import doctor, models
from nexusquant.cli.info import info
from nexusquant.cli.measure import evaluate, presets
from nexusquant.cli.prefix import inspect, pack, verify
from nexusquant.cli.warmup import warmup
from nexusquant.errors import NexusQuantError


class _Commands(TyperGroup):
    """Errors that nexusquant raises on purpose are one clear message and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NexusQuantError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Compress the KV cache of Hugging Face causal LMs, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from nexusquant import __version__

        typer.echo(f"nexusquant {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Runs before every command, and before torch is loaded."""
    # OpenMP threads that spin while they wait are tens of times slower on cores that other
    # processes use too; threads that sleep cost next to nothing. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    demo, generate, evaluate, calibrate, pack, inspect, verify, doctor, models, presets, warmup,
    info,
):  # fmt: skip
    app.command()(command)
