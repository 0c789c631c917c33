"""Threads that wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def together(work: Callable[[T, Barrier], R], given: Sequence[T]) -> list[R]:
    """`work(x, gate)` for each `x` in a thread of its own; the first error that any of them had."""
    gate, threads = Barrier(len(given), timeout=60), torch.get_num_threads()

    def run(x: T) -> R:
        torch.set_num_threads(threads)  # a new thread has OpenMP's number, and sums in its order
        with ExitStack() as on_error:
            on_error.callback(gate.abort)  # or the others would wait for this one
            result = work(x, gate)
            on_error.pop_all()
        return result

    with ThreadPoolExecutor(len(given)) as pool:
        futures = [pool.submit(run, x) for x in given]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
