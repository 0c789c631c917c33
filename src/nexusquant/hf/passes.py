"""State of the forward pass that this thread is running: hooks set it up and take it down.

A pass that fails half way (an error of ours, out of memory, an interrupt) must not leave some
layers with its tokens and some without: the layers it updated are put back as they were.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexusquant.hf.rope_tables import RotaryCall, forget_workspace, uses_rotary
from nexusquant.hf.second_pass import read_again

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer


@dataclass
class _Pass:
    """A running pass, and what the layers it updated were before."""

    model: int  # id
    before: dict[int, tuple[weakref.ref[CompactLayer], Any]] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[CompactLayer, Any]]:
        """The layers that still exist, with their state before."""
        for reference, state in self.before.values():
            layer = reference()
            if layer is not None:
                yield layer, state

    def end(self, failed: bool) -> None:
        """The pass is over; if it failed, put all layers back."""
        for layer, state in self.layers():
            if layer.rope is not None:
                forget_workspace(layer.rope.table)  # rotary rows are workspace of one pass
            if layer.profiles is not None:
                layer.profiles.end_pass(failed)
            if failed:
                layer.restore(state)


class _Running(threading.local):
    """This thread's passes, innermost last: models may call models."""

    def __init__(self) -> None:
        self.rotary: tuple[int | None, RotaryCall | None] = None, None
        self.block: tuple[nn.Module | None, torch.Tensor | None] = None, None
        self.passes: list[_Pass] = []

    def end(self, model: nn.Module) -> _Pass | None:
        """Remove the pass of `model` and what is inside it."""
        for depth, running in enumerate(self.passes):
            if running.model == id(model):
                del self.passes[depth:]
                return running
        return None


_running = _Running()


def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def begin(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the model."""
    stale = _running.end(model)
    if stale is not None:  # it never finished: a KeyboardInterrupt skips forward hooks
        _running.block = None, None
        stale.end(failed=True)
    _running.passes.append(_Pass(id(model)))


def finish(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Forward hook of the model; after an exception the output is None."""
    _running.rotary, _running.block = (None, None), (None, None)
    ended = _running.end(model)
    if ended is None:
        return
    try:
        if output is not None:
            layers = [layer for layer, _ in ended.layers()]
            read_again(model, layers, named_arguments(model, args, kwargs))
    except BaseException:
        ended.end(failed=True)
        raise
    ended.end(failed=output is None)


def note_update(layer: CompactLayer, model: nn.Module | None) -> None:
    """`layer`, of a cache of `model`, is about to receive tokens."""
    if _running.passes and _running.passes[-1].model == id(model):
        before = _running.passes[-1].before
        if id(layer) not in before:
            before[id(layer)] = weakref.ref(layer), layer.state()


def remember_rotary(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of attention modules: the rotary rows of the call that is about to run."""
    rows = kwargs.get("position_embeddings")
    given = isinstance(rows, (tuple, list)) and len(rows) == 2 and torch.is_tensor(rows[0])
    if given and rows is not None and uses_rotary(module):
        _running.rotary = id(module), RotaryCall(rows[0], rows[1], kwargs.get("position_ids"))
    else:
        _running.rotary = id(module), None


def remember_block(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of decoder layers: the residual stream that comes in."""
    stream = args[0] if args else kwargs.get("hidden_states")
    known = torch.is_tensor(stream) and stream.ndim == 3
    _running.block = module, stream.detach() if known and torch.is_tensor(stream) else None


def current_block(tokens: int) -> tuple[nn.Module | None, torch.Tensor | None]:
    """The decoder layer under way and its residual stream (batch, tokens, hidden), if known."""
    block, stream = _running.block
    return block, stream if stream is not None and stream.shape[1] == tokens else None


def rotary_of(module: nn.Module) -> RotaryCall | None:
    """The rotary rows that `module` was called with, once."""
    owner, rows = _running.rotary
    _running.rotary = None, None
    return rows if owner == id(module) else None
