"""State of the forward pass that this thread is running: hooks set it up and take it down.

A pass that fails half way (an error of ours, out of memory, an interrupt) must not leave some
layers with its tokens and some without: the layers it updated are put back as they were.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexusquant.hf.rope_tables import RotaryCall, forget_workspace

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer


class _Pass(threading.local):
    """What is known of the running pass."""

    def __init__(self) -> None:
        self.rotary: tuple[int | None, RotaryCall | None] = None, None
        self.before: dict[int, tuple[weakref.ref[CompactLayer], Any]] | None = None


_running = _Pass()


def begin(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the model."""
    if _running.before:  # the last pass never ended: a KeyboardInterrupt skips forward hooks
        _restore()
    _running.before = {}


def finish(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the model; after an exception the output is None."""
    for reference, _ in (_running.before or {}).values():
        layer = reference()
        if layer is not None and layer.rope is not None:
            forget_workspace(layer.rope.table)  # rotary rows are workspace of one pass
    if output is None:
        _restore()
    _running.before = None
    _running.rotary = None, None


def note_update(layer: CompactLayer) -> None:
    """`layer` is about to receive tokens of the running pass."""
    if _running.before is not None and id(layer) not in _running.before:
        _running.before[id(layer)] = weakref.ref(layer), layer.state()


def _restore() -> None:
    for reference, state in (_running.before or {}).values():
        layer = reference()
        if layer is not None:
            layer.restore(state)


def remember_rotary(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of attention modules: the rotary rows of the call that is about to run."""
    rows = kwargs.get("position_embeddings")
    if isinstance(rows, (tuple, list)) and len(rows) == 2 and torch.is_tensor(rows[0]):
        _running.rotary = id(module), RotaryCall(rows[0], rows[1], kwargs.get("position_ids"))
    else:
        _running.rotary = id(module), None


def rotary_of(module: nn.Module) -> RotaryCall | None:
    """The rotary rows that `module` was called with, once."""
    owner, rows = _running.rotary
    _running.rotary = None, None
    return rows if owner == id(module) else None
