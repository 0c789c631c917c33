"""The Numba kernels ahead of their first use; see `nexusquant.kernels.warmup`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from nexusquant.kernels.cpu import attend, encode, lattice, symbols
from nexusquant.kernels.cpu.compiled import Kernel
from nexusquant.kernels.cpu.kept import folder
from nexusquant.kernels.cpu.run import run
from nexusquant.kernels.warmup import Warmth

_STORAGE = lattice.quantize, lattice.reconstruct, symbols.order, symbols.number_keys


def needed(groups: Iterable[int] | None, storage: bool) -> list[Kernel]:
    """Kernels for these numbers of query heads per KV head; None: for any."""
    kernels: list[Kernel] = [run, encode.encode, encode.decode, attend.prepare, attend.merge]
    rows = attend.ROWS if groups is None else {attend.filled(group) for group in groups}
    kernels += [attend.splits[n] for n in sorted(n for n in rows if n is not None)]
    return [*kernels, *(_STORAGE if storage else ())]


def state(groups: Iterable[int] | None, storage: bool) -> Warmth:
    """What is there and what is not; compiles nothing."""
    kernels = needed(groups, storage)
    missing = [one.name for one in kernels if not one.there]
    return Warmth(tuple(missing), len(kernels), 0.0, _folder())


def warm_up(
    groups: Iterable[int] | None,
    storage: bool,
    progress: Callable[[int, int, str], None] | None,
) -> Warmth:
    """Compile what is not kept, load the rest."""
    start, kernels = time.perf_counter(), needed(groups, storage)
    missing = [one for one in kernels if not one.there]
    for done, one in enumerate(missing):
        if progress is not None:
            progress(done, len(missing), one.name)
        one.make()
    seconds = time.perf_counter() - start if missing else 0.0
    for one in kernels:
        one.make()
    return Warmth(tuple(one.name for one in missing), len(kernels), seconds, _folder())


def _folder() -> str | None:
    where = folder()
    return None if where is None else str(where)
