"""Kernels ahead of their first use, which otherwise waits for them to be compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nexusquant.kernels import operator_for


@dataclass(frozen=True)
class Warmth:
    """Which kernels there are.

    Attributes:
        compiled: names of those that were compiled now, or (from `state`) are still to be.
        kernels: how many are needed in all.
        seconds: what compiling took.
        folder: where they are kept; None: nowhere.
    """

    compiled: tuple[str, ...]
    kernels: int
    seconds: float
    folder: str | None


_NOTHING = Warmth((), 0, 0.0, None)


def warm_up(
    groups: Iterable[int] | None = None,
    storage: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Warmth:
    """Compile the CPU's kernels, or load them if they were: no generation waits for it later.

    Takes about a second per kernel, once per machine. Without Numba nothing is compiled and this
    returns at once. Triton's kernels are not meant here: Triton compiles and keeps them itself, for
    the shapes of each first call.

    Args:
        groups: query heads per KV head, of every kind of layer: what a prompt and decoding one
            token at a time need. None: for any model, and a few tokens at a time (drafts, short
            turns).
        storage: also those of stored prefixes.
        progress: called before each kernel that is compiled with how many are done, how many there
            are to compile, and its name. Not called if all are kept on disk.

    Example:
        >>> from nexusquant.kernels.warmup import state, warm_up
        >>> _ = warm_up([1, 4])
        >>> state([1, 4]).compiled
        ()
    """
    module = _module()
    made: Warmth = _NOTHING if module is None else module.warm_up(groups, storage, progress)
    return made


def state(groups: Iterable[int] | None = None, storage: bool = False) -> Warmth:
    """What `warm_up` would compile, and where kernels are kept; compiles nothing."""
    module = _module()
    found: Warmth = _NOTHING if module is None else module.state(groups, storage)
    return found


def _module() -> Any:
    """The Numba kernels, if they are what runs on CPUs."""
    if operator_for(torch.device("cpu")).name != "numba":
        return None
    return importlib.import_module("nexusquant.kernels.cpu.warmup")
