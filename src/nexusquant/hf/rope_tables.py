"""Capturing the rotary rows that a model applies, per cache and RoPE flavour."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.errors import UnsupportedError
from nexusquant.frame import KeyFrame
from nexusquant.hf.quirks import RotaryCall, own_frequencies
from nexusquant.math.rope import Frequencies, RopeTable, capture

_NAME = "apply_rotary_pos_emb"
_COMPLEX = "apply_rotary_emb"  # Llama 4: (q, k, cos + i sin), q and k (batch, tokens, heads, dim)

# cos/sin and pages computed for one forward pass: workspace, not cache content, dropped when the
# pass ends.
_workspace: weakref.WeakKeyDictionary[RopeTable, dict[object, Any]] = weakref.WeakKeyDictionary()


def forget_workspace(table: RopeTable) -> None:
    """Drop the rows computed for `table`."""
    _workspace.pop(table, None)


@dataclass(frozen=True)
class ModelRope:
    """The rotary function of a modeling module, found by name so that it can be pickled."""

    module_name: str

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        module = sys.modules[self.module_name]
        function = getattr(module, _NAME, None)
        if function is None:
            rows = torch.complex(cos.float(), sin.float())
            some = q if q.shape[1] else k  # it cannot reshape nothing
            turned = getattr(module, _COMPLEX)(some.transpose(1, 2), k.transpose(1, 2), rows)
            return turned[0].transpose(1, 2)[:, : q.shape[1]], turned[1].transpose(1, 2)
        second = _second_parameter(function)
        if second == "cos":  # one vector at a time
            return function(q, cos, sin, unsqueeze_dim=1), function(k, cos, sin, unsqueeze_dim=1)
        if second == "sin":  # so do GPT-J and CodeGen, with (batch, tokens, heads, dim)
            q, k = (function(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k))
            return q, k
        turned = function(q, k, cos, sin)
        return turned[0], turned[1]

    @staticmethod
    def of(module: nn.Module) -> ModelRope | None:
        """The function that the file of `module` defines, if it does."""
        name = type(module).__module__
        known = any(hasattr(sys.modules[name], function) for function in (_NAME, _COMPLEX))
        return ModelRope(name) if known else None


@lru_cache(maxsize=64)
def _second_parameter(function: Callable[..., Any]) -> str:
    return list(inspect.signature(function).parameters)[1]


@dataclass
class LayerRope:
    """A layer's view of a table; the layer that made the table also maintains it."""

    table: RopeTable
    owner: bool

    def frame(self, page: int) -> KeyFrame:
        """The key frame, sharing its rows with the other layers of this forward pass."""
        return KeyFrame(self.table, page, _workspace.setdefault(self.table, {}))

    def truncate(self, length: int) -> None:
        """Forget slots from `length` on."""
        if self.owner:
            forget_workspace(self.table)
            self.table.truncate(length)

    def map(self, fn: Callable[[Tensor], Tensor], batch: int) -> None:
        """Apply a batch operation, once per table."""
        if self.owner:
            forget_workspace(self.table)
            self.table.map(fn, batch)


def _nothing() -> None:
    """Where a weak reference was before pickling or saving."""


class RopeBook:
    """The rotary tables of one cache. Layers that get the same cos tensor share a table."""

    def __init__(self) -> None:
        self.tables: list[RopeTable] = []
        # of the rows last recorded, per table
        self.sources: list[Callable[[], Tensor | None]] = []

    @staticmethod
    def of(tables: list[RopeTable]) -> RopeBook:
        """The book of a cache that was made elsewhere: no layer joins these tables any more."""
        book = RopeBook()
        book.tables, book.sources = list(tables), [_nothing] * len(tables)
        return book

    def __getstate__(self) -> dict[str, Any]:
        return {"tables": self.tables, "sources": [_nothing] * len(self.sources)}

    def record(
        self,
        rope: LayerRope | None,
        call: RotaryCall | None,
        module: nn.Module,
        past: int,
        candidates: Callable[[], list[Frequencies]],
        head_dim: int,
    ) -> LayerRope | None:
        """Record the rows of slots past, past + 1, ... and return the layer's rope.

        None (keys stay as rotated) if the model passes no rows or they cannot be inverted.

        Raises:
            UnsupportedError: a layer whose keys are un-rotated was called without rows.
        """
        if call is None:
            if rope is not None:
                raise UnsupportedError(
                    "this layer's rotary rows were captured before but not for this call; call the"
                    " model through its own forward."
                )
            return None
        new = call.cos.shape[1]
        if rope is None:
            if past:
                return None
            for table, source in zip(self.tables, self.sources, strict=True):
                if source() is call.source and table.length == past + new:
                    return LayerRope(table, owner=False)
            apply = ModelRope.of(module)
            if apply is None:
                return None
            rope = LayerRope(RopeTable(apply), owner=True)
            self._extend(rope, call, past, candidates)
            if not _invertible(rope, head_dim):
                return None
            self.tables.append(rope.table)
            self.sources.append(weakref.ref(call.source))
        elif rope.owner:
            self._extend(rope, call, past, candidates)
            self.sources[self.tables.index(rope.table)] = weakref.ref(call.source)
        return rope

    @staticmethod
    def _extend(
        rope: LayerRope,
        call: RotaryCall,
        past: int,
        candidates: Callable[[], list[Frequencies]],
    ) -> None:
        positions = call.position_ids
        if positions is None or positions.ndim != 2 or positions.shape[1] != call.cos.shape[1]:
            first = past
            positions = torch.arange(first, first + call.cos.shape[1])[None]
        forget_workspace(rope.table)

        def guesses() -> Iterator[Frequencies]:
            last = rope.table.spans[-1] if rope.table.spans else None
            if last is not None and last.frequencies is not None:
                yield last.frequencies, last.scaling
            yield from candidates()  # searching the model takes longer than a decode step may

        rope.table.extend(past, capture(call.cos, call.sin, positions, guesses()))


def _invertible(rope: LayerRope, head_dim: int) -> bool:
    """Whether un-rotating and rotating gives a vector back: the function may expect other rows."""
    cos = rope.table.rows(1)[0]
    slots = torch.arange(min(8, cos.shape[1]), device=cos.device).view(1, 1, -1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(cos), 1, slots.shape[-1], head_dim, generator=generator).to(cos.device)
    frame = KeyFrame(rope.table, 1)
    try:
        back = frame.leave(frame.enter(x, slots), slots)
    except (RuntimeError, ValueError, TypeError):
        return False
    return bool((back - x).abs().max() < 1e-3)


def rotary_frequencies(model: nn.Module) -> list[Frequencies]:
    """Every inverse-frequency buffer of a model with its scaling, as they are now."""
    found: list[Frequencies] = []
    for module in model.modules():
        found += own_frequencies(module)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1:
                scaling = getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0)
                found.append((buffer, float(scaling)))
    return found
