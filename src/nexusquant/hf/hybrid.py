"""Layers with a linear-attention or convolution state, with or without attention beside it.

The state stays exact. transformers overwrites parts of it in place, so what a forward pass started
from is copied, to be put back should the pass fail; a state takes as much as some tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.notices import Notices
from nexusquant.hf.passes import note_update
from nexusquant.hf.sliding import CompactSlidingLayer
from nexusquant.hf.transformers_private import STOCK_HYBRID, STOCK_LINEAR

_Linear: Any = STOCK_LINEAR or object

_STATES = ("conv_states", "recurrent_states")
_KNOWN = (
    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
    "conv_kernel_size",
)  # fmt: skip


class LinearStateLayer(_Linear):
    """transformers' linear-attention layer, whose state can be put back and rearranged."""

    stores_tokens = False
    changes_in_place = True  # models write into the state itself when they decode
    lease: Any = None

    def _noted(self) -> LinearStateLayer:
        note_update(self, self.lease.model if self.lease is not None else None)
        return self

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers does, after noting what was there before."""
        return super(LinearStateLayer, self._noted()).update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers does, after noting what was there before."""
        return super(LinearStateLayer, self._noted()).update_recurrent_state(*args, **kwargs)

    def state(self) -> Any:
        """What `restore` needs to undo the updates that follow."""
        known = {name: dict(getattr(self, name)) for name in _KNOWN if hasattr(self, name)}
        copies = {
            name: {i: x if x is None else x.clone() for i, x in getattr(self, name).items()}
            for name in _STATES
        }
        return copies | known

    def restore(self, state: Any) -> None:
        """Back to an earlier `state`."""
        for name, value in state.items():
            setattr(self, name, value)

    def end_pass(self, failed: bool) -> None:
        """A forward pass is over."""

    @property
    def elements(self) -> int:
        """Of the state, compressed or not."""
        states = [x for name in _STATES for x in getattr(self, name).values() if x is not None]
        return sum(x.numel() for x in states)

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` removes from the end.

        Raises:
            UnsupportedError: the state cannot be rolled back.
        """
        if tokens_to_remove and not (self.record_past and self.is_croppable):
            raise UnsupportedError(
                "this model keeps a linear-attention state, which cannot be rolled back"
                + ("." if self.record_past else " unless activate_past_recording() came before.")
            )
        return max(-tokens_to_remove, 0)

    def _map_states(self, fn: Callable[[Tensor], Tensor]) -> None:
        for name in _STATES:
            held = getattr(self, name)
            held.update({i: fn(x) for i, x in held.items() if x is not None})

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row `repeats` times in a row."""
        self._map_states(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._map_states(lambda x: x[indices])


_Hybrid: Any = STOCK_HYBRID or object


class CompactHybridLayer(LinearStateLayer, CompactLayer, _Hybrid):
    """A state and full attention in one layer (Falcon-H1): the attention is compressed.

    transformers finds the layer whose masks are those of full attention by its own class.
    """

    is_compileable = False
    stores_tokens = True
    _attention: type[CompactLayer] = CompactLayer

    def __init__(
        self,
        config: CompressionConfig,
        layer_idx: int,
        notices: Notices,
        *window: Any,
        number_of_states: int = 1,
    ) -> None:
        self._attention.__init__(self, config, layer_idx, notices, *window)
        STOCK_LINEAR.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the attention with keys and values, of the state with named arguments."""
        part: Any = self._attention if args else STOCK_LINEAR
        part.lazy_initialization(self, *args, **kwargs)

    def state(self) -> Any:
        """What `restore` needs to undo the updates that follow."""
        return self._attention.state(self), LinearStateLayer.state(self)

    def restore(self, state: Any) -> None:
        """Back to an earlier `state`."""
        self._attention.restore(self, state[0])
        LinearStateLayer.restore(self, state[1])

    def end_pass(self, failed: bool) -> None:
        """A forward pass is over."""
        self._attention.end_pass(self, failed)

    def tensors(self) -> list[Any]:
        """Everything that holds storage, for accounting."""
        return [*self._attention.tensors(self), *(getattr(self, name) for name in _STATES)]

    @property
    def elements(self) -> int:
        """Elements that an uncompressed layer would hold now."""
        parts: Any = LinearStateLayer.elements, self._attention.elements  # two properties
        return sum(part.fget(self) for part in parts)

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` removes from the end. Raises `UnsupportedError` if it cannot."""
        LinearStateLayer.check_crop(self, tokens_to_remove)
        return self._attention.check_crop(self, tokens_to_remove)

    @property
    def is_croppable(self) -> bool:
        """Whether the state is."""
        return bool(STOCK_LINEAR.is_croppable.fget(self))


def _both(name: str) -> Any:
    def apply(self: Any, *args: Any) -> None:
        getattr(LinearStateLayer, name)(self, *args)
        getattr(self._attention, name)(self, *args)

    apply.__doc__ = "Of the state and of the attention."
    return apply


for _name in (
    "reset", "offload", "prefetch", "reorder_cache", "crop", "batch_repeat_interleave",
    "batch_select_indices",
):  # fmt: skip
    setattr(CompactHybridLayer, _name, _both(_name))


class CompactHybridSlidingLayer(CompactHybridLayer, CompactSlidingLayer):
    """A state and sliding-window attention in one layer (Inkling)."""

    is_sliding = True
    _attention = CompactSlidingLayer
