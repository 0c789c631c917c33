"""State of the forward pass that this thread is running: hooks set it up and take it down.

A pass that fails half way (an error of ours, out of memory, an interrupt) must not leave some
layers with its tokens and some without: the layers it updated are put back as they were.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from nexusquant.hf.cache_names import given_cache, named_arguments
from nexusquant.hf.quirks import RotaryCall, layer_of, rotary_call
from nexusquant.hf.second_pass import read_again
from nexusquant.hf.uncompiled import uncompiled

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer


class Undoable(Protocol):
    """A cache layer that a failed pass leaves as it was."""

    stores_tokens: bool

    def state(self) -> Any:
        """What `restore` needs to undo the updates that follow."""

    def restore(self, state: Any) -> None:
        """Back to an earlier `state`."""

    def end_pass(self, failed: bool) -> None:
        """The pass is over."""


class _StockLayer:
    """A layer of transformers beside ours. It replaces its tensors, so references undo it."""

    stores_tokens = False

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def state(self) -> Any:
        """What the layer holds."""
        return {
            k: copy.copy(v) if isinstance(v, _OPEN) else v for k, v in vars(self._layer).items()
        }

    def restore(self, state: Any) -> None:
        """Back to an earlier `state`."""
        vars(self._layer).clear()
        vars(self._layer).update(state)

    def end_pass(self, failed: bool) -> None:
        """The pass is over."""


_OPEN = (dict, list, set)


@dataclass
class _Pass:
    """A running pass, and what the layers it updated were before."""

    model: int  # id
    before: dict[int, tuple[Callable[[], Any], Any]] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[Undoable, Any]]:
        """The layers that still exist, with their state before."""
        for reference, state in self.before.values():
            layer = reference()
            if layer is not None:
                yield layer, state

    def end(self, failed: bool) -> None:
        """The pass is over; if it failed, put all layers back."""
        for layer, state in self.layers():
            layer.end_pass(failed)
            if failed:
                layer.restore(state)


@dataclass(frozen=True)
class _Attention:
    """The attention module entered last, and what it was called with."""

    module: nn.Module
    rotary: RotaryCall | None
    mask: Any


class _Running(threading.local):
    """This thread's passes, innermost last: models may call models."""

    def __init__(self) -> None:
        self.attention: _Attention | None = None
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


@uncompiled
def begin(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of the model, with its arguments by name and by place."""
    stale = _running.end(model)
    if stale is not None:  # it never finished: a KeyboardInterrupt skips forward hooks
        _running.attention, _running.block = None, (None, None)
        stale.end(failed=True)
    given = named_arguments(model, args, kwargs)
    _running.passes.append(_Pass(id(model)))
    layers = getattr(given_cache(given), "layers", ())
    if any(hasattr(layer, "stores_tokens") for layer in layers):  # else it is none of ours
        for layer in layers:
            if not hasattr(layer, "stores_tokens"):
                note_update(_StockLayer(layer), model)
            elif getattr(layer, "changes_in_place", False):
                note_update(layer, model)


@uncompiled
def finish(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Forward hook of the model; after an exception the output is None."""
    _running.attention, _running.block = None, (None, None)
    ended = _running.end(model)
    if ended is None:
        return
    try:
        if output is not None:
            layers: list[Any] = [layer for layer, _ in ended.layers() if layer.stores_tokens]
            for layer in layers:
                layer.absorb_unseen()
            read_again(model, layers, named_arguments(model, args, kwargs))
    except BaseException:
        ended.end(failed=True)
        raise
    ended.end(failed=output is None)


def note_update(layer: Undoable, model: nn.Module | None) -> None:
    """`layer`, of a cache of `model`, is about to receive tokens."""
    if _running.passes and _running.passes[-1].model == id(model):
        before = _running.passes[-1].before
        if id(layer) not in before:
            stock = isinstance(layer, _StockLayer)  # which only the pass holds
            before[id(layer)] = (lambda: layer) if stock else weakref.ref(layer), layer.state()


def note_read(layer: CompactLayer) -> None:
    """Keys or values of `layer` are read as a tensor; if by its model, all must stay readable."""
    if _running.passes and id(layer) in _running.passes[-1].before:
        layer.read = True


@uncompiled
def remember_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of attention modules: the call that is about to run."""
    rotary = rotary_call(module, args, kwargs)
    _running.attention = _Attention(module, rotary, kwargs.get("attention_mask"))


def attention_under_way(layer: CompactLayer) -> tuple[nn.Module, Any] | None:
    """The module that computes attention over `layer` now and its mask, if that is known."""
    running = _running.attention
    if running is None or layer_of(running.module) != layer.layer_idx:
        return None
    return running.module, running.mask


@uncompiled
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
    """The rotary rows that `module` was called with."""
    running = _running.attention
    return running.rotary if running is not None and running.module is module else None
