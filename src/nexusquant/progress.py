"""What a user sees while a command works: which step it is at, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
