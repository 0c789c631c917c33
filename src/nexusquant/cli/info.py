"""`nexusquant info`: versions, and who does the work on which device."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import typer

from nexusquant.versions import TRANSFORMERS


def info() -> None:
    """Print versions, the operators of every device, and where compiled kernels are kept."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from nexusquant.kernels import operator_for, operators
    from nexusquant.kernels.warmup import state

    tested = {"transformers": f"{TRANSFORMERS[0]} to {TRANSFORMERS[1]}"}
    table = Table("package", "version", "tested with")
    for name in ("nexusquant", "torch", "transformers", "numba", "triton"):
        table.add_row(name, _version(name), tested.get(name, ""))
    console = Console()
    console.print(table)
    table = Table("device", "operator", "in use", "why not")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        used = operator_for(torch.device(device)).name
        for name, reason in operators(device).items():
            table.add_row(device, name, "yes" if name == used else "", reason)
    console.print(table)
    kernels = state(storage=True)
    if kernels.kernels:
        there = kernels.kernels - len(kernels.compiled)
        console.print(f"compiled kernels: {there} of {kernels.kernels}, in", highlight=False)
        typer.echo(kernels.folder or "no folder: this user has no home directory")
        if kernels.compiled:
            typer.echo("`nexusquant warmup` compiles the others")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
