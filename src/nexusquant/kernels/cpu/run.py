"""The loop that runs kernels on all threads."""

from __future__ import annotations

from numba import prange, types

from nexusquant.kernels.cpu.compiled import Kernel
from nexusquant.kernels.cpu.memory import call_task, get_long


def _run(steps, count):
    """Kernels one after another, their tasks side by side.

    Args:
        steps: address of (count, 3) int64: a kernel's address, its arguments', and how many tasks.
    """
    for i in range(count):
        function, arguments = get_long(steps, 3 * i), get_long(steps, 3 * i + 1)
        for task in prange(get_long(steps, 3 * i + 2)):
            call_task(function, arguments, task)


run = Kernel(_run, types.void(types.intp, types.intp), "run", parallel=True)
