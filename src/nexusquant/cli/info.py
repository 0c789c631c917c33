"""`nexusquant info`: versions, and who does the work on which device."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from nexusquant.versions import TRANSFORMERS


def info() -> None:
    """Print versions, and the operators of every device."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from nexusquant.kernels import operator_for, operators

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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
