"""Compiled functions: helpers, kernels, and the loop that runs kernels on all threads.

Numba compiles a function together with everything that it calls, once more at every level of
calls, and writes wrappers for callers from Python. So helpers have none; a kernel is compiled by
itself, and `run` is handed its address and that of its arguments.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import njit, types
from numba.core.registry import cpu_target

from nexusquant.kernels.cpu.kept import Kept

if platform.machine() in ("x86_64", "AMD64"):
    _features = cpu_target.target_context.codegen().magic_tuple()[2]
    if "+f16c" not in _features:  # LLVM would end the process, for want of a function in its place
        raise ImportError("this CPU, or NUMBA_CPU_NAME, has no half-precision conversion (F16C)")

_logger = logging.getLogger(__name__)
_lock = threading.RLock()
_told: list[str] = []

_ALONE: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(error_model="numpy", **_ALONE)
"""Decorates what only kernels call."""


def tell(name: str) -> None:
    """One line in the log, once per process: the first use of a cache is taking long."""
    with _lock:
        if not _told:
            _told.append(name)
            _logger.warning(
                "compiling kernels for this CPU, once (about a second each);"
                " `nexusquant warmup` does it ahead"
            )


class Kernel:
    """A function with one signature, compiled or read from the disk when it is first needed."""

    def __init__(
        self, function: Callable[..., Any], signature: Any, name: str, **options: Any
    ) -> None:
        self.name = name
        self.signature = signature
        self.dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
        self.kept = self.dispatcher._cache = Kept(name)

    @cached_property
    def compiled(self) -> Any:
        """Numba's result. The first access compiles, or reads what was kept."""
        with _lock:
            if not self.there:
                tell(self.name)
            return self.make()

    def make(self) -> Any:
        """The same without a word in the log."""
        self.dispatcher.compile(self.signature)
        return self.dispatcher.overloads[tuple(self.signature.args)]

    @property
    def there(self) -> bool:
        """Whether this process or the disk has it."""
        return bool(self.dispatcher.overloads) or self.kept.read() is not None

    def __call__(self, *arguments: Any) -> Any:
        """Run it, with arguments that fit its signature."""
        _ = self.compiled
        return self.dispatcher(*arguments)


class Task(Kernel):
    """A kernel of (address of its arguments, number of the task), for `run`."""

    def __init__(self, function: Callable[[Any, Any], None], name: str) -> None:
        kind = types.void(types.intp, types.intp)
        super().__init__(function, kind, name, no_cpython_wrapper=True)

    @cached_property
    def address(self) -> int:
        """Where its machine code is."""
        made = self.compiled
        return int(made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name))
