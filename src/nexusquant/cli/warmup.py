"""`nexusquant warmup`: compile the kernels ahead, for servers and containers."""

from __future__ import annotations

from typing import Annotated

import typer

from nexusquant.cli.common import folder
from nexusquant.errors import UnsupportedError


def warmup(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, model folder, .gguf file or 'demo'; default: for any model."),
    ] = None,
) -> None:
    """Compile the CPU's kernels now, once on a machine, instead of in the first generation.

    With MODEL only what a prompt and single tokens need under its config; no weights are loaded.
    """
    from nexusquant.hf.coverage import cover
    from nexusquant.hf.kernels import query_groups
    from nexusquant.kernels.warmup import warm_up
    from nexusquant.loading import load_config
    from nexusquant.progress import kernel_report, progress_steps, quiet_transformers

    with quiet_transformers(), progress_steps() as progress:
        groups = None
        if model is not None:
            config = load_config(folder(model, progress))
            if refused := cover(config).refused:
                raise UnsupportedError(f"{model}: {refused}. It needs no kernels.")
            groups = query_groups(config)
        made = warm_up(groups, model is None, kernel_report(progress))
    if not made.kernels:
        typer.echo("nothing to compile: without Numba (pip install numba) PyTorch does the work")
    elif made.compiled:
        names = ", ".join(made.compiled)
        typer.echo(f"compiled in {made.seconds:.1f} s: {names}")
    else:
        typer.echo(f"all {made.kernels} kernels are there")
    if made.kernels:
        typer.echo(f"kept in {made.folder}" if made.folder else "kept nowhere: no home directory")
