"""The Numba kernels ahead of their first use; see `nexusquant.kernels.warmup`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from nexusquant.kernels.cpu import attend, encode, lattice, symbols
from nexusquant.kernels.cpu.compiled import Kernel
from nexusquant.kernels.cpu.kept import folder
from nexusquant.kernels.cpu.run import run
from nexusquant.kernels.warmup import Warmth

STORAGE = lattice.quantize, lattice.reconstruct, symbols.order, symbols.number_keys


def needed(groups: Iterable[int] | None) -> list[Kernel]:
    """Kernels of a generation with these numbers of query heads per KV head; None: all."""
    coding = [run, encode.encode, encode.decode, attend.prepare, attend.merge]
    if groups is None:
        return [*coding, *attend.splits.values(), *STORAGE]
    rows = {next((n for n in attend.ROWS if n >= group), None) for group in groups}
    return [*coding, *(attend.splits[n] for n in sorted(n for n in rows if n is not None))]


def state(groups: Iterable[int] | None = None) -> Warmth:
    """What is there and what is not; compiles nothing."""
    kernels = needed(groups)
    missing = [one.name for one in kernels if not one.loaded and one.kept.read() is None]
    where = folder()
    return Warmth(tuple(missing), len(kernels), 0.0, None if where is None else str(where))


def warm_up(
    groups: Iterable[int] | None, progress: Callable[[int, int, str], None] | None
) -> Warmth:
    """Compile what is not kept, load the rest."""
    start, kernels = time.perf_counter(), needed(groups)
    missing = [one for one in kernels if not one.loaded and one.kept.read() is None]
    for done, one in enumerate(missing):
        if progress is not None:
            progress(done, len(missing), one.name)
        one.make()
    seconds = time.perf_counter() - start if missing else 0.0
    for one in kernels:
        one.make()
    where = folder()
    return Warmth(
        tuple(one.name for one in missing), len(kernels), seconds,
        None if where is None else str(where),
    )  # fmt: skip
