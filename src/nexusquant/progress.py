"""What a user sees while a command works: which step it is at, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Progress on stderr: a live line in a terminal, one line per step anywhere else."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("Starting", total=None)

    def step(self, text: str) -> None:
        """A new step: its clock starts at zero."""
        if self.progress.console.is_terminal:
            self.progress.reset(self.task, description=text)
        else:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def tick(self, text: str) -> None:
        """News of the step under way."""
        self.progress.update(self.task, description=text)


@contextmanager
def progress_steps() -> Iterator[Steps]:
    """Steps to report to; the live line is gone at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        yield Steps(progress)


def kernel_report(progress: Steps) -> Callable[[int, int, str], None]:
    """What `warm_up` is to call: one line, that counts in a terminal."""

    def report(done: int, of: int, name: str) -> None:
        show = progress.tick if done else progress.step
        show(f"compiling kernels for this CPU, once: {done + 1} of {of}")

    return report


def compile_kernels(progress: Steps, model: Any, storage: bool = False) -> str:
    """Have all kernels before anything is timed; says nothing if they were compiled before.

    Args:
        model: a transformers model. On a GPU nothing is compiled here.
        storage: also those of stored prefixes.

    Returns:
        A line that says how long it took, "" if nothing was compiled.
    """
    from nexusquant.hf.kernels import query_groups
    from nexusquant.kernels.warmup import warm_up

    if model.device.type != "cpu":
        return ""
    made = warm_up(query_groups(model.config), storage, kernel_report(progress))
    if not made.compiled:
        return ""
    return f"compiling kernels took {made.seconds:.1f} s, once on this machine"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading bars and advice would break up the command's own output; restored on exit."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
