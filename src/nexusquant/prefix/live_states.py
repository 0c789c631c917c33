"""The states of linear-attention and convolution layers, in streams and back."""

from __future__ import annotations

from typing import Any

from nexusquant.errors import UnsupportedError
from nexusquant.hf.hybrid import LinearStateLayer
from nexusquant.prefix.arrays import DTYPES, FLOATS, ArrayReader, ArrayWriter, name_of
from nexusquant.prefix.fields import Fields

_NAMES = ("conv_states", "recurrent_states")
_MAX_AXES = 8
_MAX_SIZE = 1 << 30


def write_states(layer: LinearStateLayer, out: ArrayWriter) -> dict[str, Any]:
    """A description, with the tensors."""
    count = range(layer.number_of_states)
    about: dict[str, Any] = {
        "dtype": None if layer.dtype is None else name_of(layer.dtype),
        "previous": [bool(layer.has_previous_state[i]) for i in count],
        "kernels": [getattr(layer, "conv_kernel_size", {}).get(i) for i in count],
    }
    for name in _NAMES:
        about[name] = [_write_state(getattr(layer, name)[i], out) for i in count]
    return about


def _write_state(x: Any, out: ArrayWriter) -> dict[str, Any] | None:
    if x is None:
        return None
    if not 1 <= x.ndim <= _MAX_AXES:
        raise UnsupportedError(f"a state of {x.ndim} axes cannot be saved.")
    return {"dtype": out.put(x, *x.shape), "shape": list(x.shape)}


def read_states(layer: LinearStateLayer, about: Fields, arrays: ArrayReader, batch: int) -> None:
    """Inverse of `write_states`."""
    count = layer.number_of_states
    previous, kernels = about.items("previous"), about.items("kernels")
    if len(previous) != count or any(type(x) is not bool for x in previous):
        raise about.fail("previous", f"{count} times true or false")
    if len(kernels) != count or not all(
        x is None or (type(x) is int and 1 <= x <= _MAX_SIZE) for x in kernels
    ):
        raise about.fail("kernels", f"{count} sizes or null")
    if not about.is_null("dtype"):
        layer.dtype, layer.device = DTYPES[about.choice("dtype", FLOATS)], arrays.device
    layer.has_previous_state = dict(enumerate(previous))
    if hasattr(layer, "conv_kernel_size"):
        layer.conv_kernel_size = dict(enumerate(kernels))
    for name in _NAMES:
        states = about.items(name)
        if len(states) != count:
            raise about.fail(name, f"{count} states")
        known = [
            None if x is None else _read_state(Fields(x, f"{about.where}, {name}"), arrays, batch)
            for x in states
        ]
        setattr(layer, name, dict(enumerate(known)))
        setattr(layer, f"is_{name}_initialized", {i: x is not None for i, x in enumerate(known)})
    about.close()
    for kernel, x in zip(kernels, layer.conv_states.values(), strict=True):
        if kernel is not None and not layer.record_past and (x is None or x.shape[-1] != kernel):
            raise about.fail("kernels", "the sizes of the convolutions' states")


def _read_state(about: Fields, arrays: ArrayReader, batch: int) -> Any:
    shape, dtype = about.items("shape"), about.choice("dtype", FLOATS)
    about.close()
    sizes = all(type(x) is int and 1 <= x <= _MAX_SIZE for x in shape)
    if not 1 <= len(shape) <= _MAX_AXES or not sizes or (batch and shape[0] != batch):
        raise about.fail("shape", f"positive sizes, {batch} first")
    return arrays.take(about.where, dtype, *shape)
