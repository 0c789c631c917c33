"""The layers of a cache, in streams and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nexusquant.errors import FormatError, UnsupportedError
from nexusquant.hf.hybrid import (
    CompactHybridLayer,
    CompactHybridSlidingLayer,
    LinearStateLayer,
)
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.rope_tables import LayerRope
from nexusquant.hf.sliding import CompactSlidingLayer
from nexusquant.hf.tail import Tail
from nexusquant.hf.transformers_private import DynamicLayer, DynamicSlidingWindowLayer
from nexusquant.math.rope import RopeTable
from nexusquant.prefix.arrays import DTYPES, FLOATS, ArrayReader, ArrayWriter, name_of
from nexusquant.prefix.fields import Fields
from nexusquant.prefix.live_coded import Coder
from nexusquant.prefix.live_rope import check_rotation
from nexusquant.prefix.live_slots import Shape
from nexusquant.prefix.live_states import read_states, write_states
from nexusquant.prefix.live_stored import read_stored, write_stored
from nexusquant.retention import WINDOW

_KINDS: dict[type, str] = {
    CompactLayer: "full",
    CompactSlidingLayer: "sliding",
    LinearStateLayer: "state",
    CompactHybridLayer: "state and full",
    CompactHybridSlidingLayer: "state and sliding",
    DynamicLayer: "stock",
    DynamicSlidingWindowLayer: "stock sliding",
}
_FLAGS = ("exact", "reached", "read", "pending")
_MAX_HEADS = 1 << 16
_MAX_DIM = 1 << 13


@dataclass
class Whole:
    """What the layers of one cache share.

    Attributes:
        batch: rows; 0 if the cache is empty.
        length: slots.
        tables: rotary tables, in the order of the first layer that uses each.
    """

    batch: int
    length: int
    tables: list[RopeTable] = field(default_factory=list)


def kind_of(layer: Any, index: int) -> str | None:
    """The name of a layer's kind in files; None for layers that never hold anything.

    Raises:
        UnsupportedError: one that cannot be saved.
    """
    name = type(layer).__name__
    if name == "DummyLayer":
        return None
    if type(layer) not in _KINDS:
        raise UnsupportedError(f"layer {index} ({name}) is of a kind that cannot be saved.")
    return _KINDS[type(layer)]


def whole_of(layers: list[Any]) -> Whole:
    """Of a cache to be saved.

    Raises:
        UnsupportedError: layers of different lengths.
    """
    held = [x for x in layers if isinstance(x, CompactLayer) and x.tail is not None]
    shapes = {(layer.batch_size, layer.length) for layer in held}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"the layers of this cache differ in (sequences, tokens): {sorted(shapes)}. Save it"
            " when no forward pass is under way."
        )
    return Whole(*(shapes.pop() if shapes else (0, 0)))


# -- writing


def write_layer(layer: Any, index: int, whole: Whole, out: ArrayWriter) -> dict[str, Any]:
    """A description, with the tensors.

    Raises:
        UnsupportedError: something is under way, or not of a known form.
    """
    about: dict[str, Any] = {"kind": kind_of(layer, index)}
    if hasattr(layer, "record_past"):
        about["record_past"] = layer.record_past
    if isinstance(layer, CompactLayer):
        if layer.deferred is not None or layer.waiting is not None or layer.repeating:
            raise UnsupportedError(
                f"tokens of layer {index} wait for a crop or for a second pass: save the cache"
                " when generation is over."
            )
        about["held"] = None if layer.tail is None else _write_held(layer, index, whole, out)
    elif isinstance(layer, DynamicLayer):
        about["held"] = _write_stock(layer, out) if layer.is_initialized else None
    if isinstance(layer, LinearStateLayer):
        about["states"] = write_states(layer, out)
    return about


def _write_held(layer: CompactLayer, index: int, whole: Whole, out: ArrayWriter) -> dict[str, Any]:
    tail = layer.tail
    assert tail is not None
    batch, heads, count, key_dim = tail.keys.shape
    value_dim = tail.values.shape[-1]
    about: dict[str, Any] = {name: getattr(layer, name) for name in _FLAGS}
    about |= {"dtype": name_of(layer.dtype), "heads": heads, "dims": [key_dim, value_dim]}
    if isinstance(layer, CompactSlidingLayer):
        about["gone"] = layer.gone
    about["rope"] = None if layer.rope is None else _table_number(layer.rope, index, whole)
    pairs = (tail.keys, key_dim), (tail.values, value_dim)
    about["tail"] = {
        "count": count,
        "dtypes": [out.put(x, batch, heads, count, dim) for x, dim in pairs],
        "queries": None,
    }
    if tail.queries is not None:
        more, latest = tail.queries.shape[1:3]
        dtype = out.put(tail.queries, batch, more, latest, key_dim)
        about["tail"]["queries"] = {"heads": more, "count": latest, "dtype": dtype}
    shape = Shape(batch, heads, (key_dim, value_dim), layer.tail_start)
    return about | {"stored": write_stored(layer.stored, shape, out)}


def _table_number(rope: LayerRope, index: int, whole: Whole) -> int:
    """Which of the cache's tables a layer uses; the first layer that does maintains it."""
    number = next((i for i, table in enumerate(whole.tables) if table is rope.table), None)
    if rope.owner is not (number is None):
        raise UnsupportedError(f"layer {index} uses rotary rows of a later layer.")
    if number is None:
        number = len(whole.tables)
        whole.tables.append(rope.table)
    return number


def _write_stock(layer: Any, out: ArrayWriter) -> dict[str, Any]:
    keys, values = layer.keys, layer.values
    if not keys.numel():
        raise UnsupportedError("a layer of transformers that was cropped to nothing.")
    shapes = [list(x.shape) for x in (keys, values)]
    dtypes = [out.put(x, *shape) for x, shape in zip((keys, values), shapes, strict=True)]
    return {"shapes": shapes, "dtypes": dtypes, "length": int(layer.get_seq_length())}


# -- reading


@dataclass(frozen=True)
class Surroundings:
    """What a layer is read for.

    Attributes:
        known: KV heads and dimensions of keys and values that the model has there, if known.
        table: the rotary table of a number, read when its first layer asks.
    """

    whole: Whole
    coder: Coder
    known: tuple[int, int, int] | None
    table: Callable[[int], LayerRope]


def read_layer(layer: Any, index: int, arrays: ArrayReader, around: Surroundings) -> None:
    """Fill a new layer of the model's. Inverse of `write_layer`."""
    about = arrays.about
    kind = kind_of(layer, index)
    if about.text("kind") != kind:
        raise FormatError(f"{about.where}: of another kind than the model's, {kind}.")
    if hasattr(layer, "record_past"):
        layer.record_past = about.flag("record_past")
    if isinstance(layer, CompactLayer):
        if not about.is_null("held"):
            _read_held(layer, about.part("held"), arrays, around)
    elif isinstance(layer, DynamicLayer) and not about.is_null("held"):
        _read_stock(layer, about.part("held"), arrays, around.whole)
    if isinstance(layer, LinearStateLayer):
        read_states(layer, about.part("states"), arrays, around.whole.batch)
    arrays.close()


def _read_held(
    layer: CompactLayer, about: Fields, arrays: ArrayReader, around: Surroundings
) -> None:
    whole = around.whole
    if not whole.batch:
        raise FormatError(f"{about.where}: tokens of no sequence.")
    heads, dims = about.integer("heads", 1, _MAX_HEADS), about.items("dims")
    if len(dims) != 2 or any(type(x) is not int or not 1 <= x <= _MAX_DIM for x in dims):
        raise about.fail("dims", f"two numbers from 1 to {_MAX_DIM}")
    if around.known not in (None, (heads, *dims)):
        raise FormatError(
            f"{about.where}: {heads} KV heads of dimensions {dims}, the model's are {around.known}."
        )
    for name in _FLAGS:
        setattr(layer, name, about.flag(name))
    layer.dtype, layer.device = DTYPES[about.choice("dtype", FLOATS)], arrays.device
    if isinstance(layer, CompactSlidingLayer):
        layer.gone = about.integer("gone", 0, whole.length)
    if not about.is_null("rope"):
        layer.rope = around.table(about.integer("rope", 0, len(whole.tables)))
        check_rotation(layer.rope.table, dims[0], about.where)
        if layer.rope.table.length != whole.length and not layer.exact:
            raise FormatError(f"{about.where}: rotary rows of another length than the layer's.")
    layer.tail = _read_tail(about.part("tail"), heads, (dims[0], dims[1]), whole, arrays)
    layer.length, layer.is_initialized = whole.length, True
    shape = Shape(whole.batch, heads, (dims[0], dims[1]), layer.tail_start)
    layer.stored = read_stored(about.part("stored"), shape, around.coder, arrays)
    about.close()
    if layer.exact and (layer.stored.body or layer.stored.sinks):
        raise FormatError(f"{about.where}: a layer that is never compressed holds codes.")


def _read_tail(
    about: Fields, heads: int, dims: tuple[int, int], whole: Whole, arrays: ArrayReader
) -> Tail:
    count, dtypes = about.integer("count", 0, whole.length), about.pair("dtypes", FLOATS)
    keys, values = (
        arrays.take(f"{about.where}, {what}", dtype, whole.batch, heads, count, dim)
        for what, dtype, dim in zip(("keys", "values"), dtypes, dims, strict=True)
    )
    queries: Tensor | None = None
    if not about.is_null("queries"):
        latest = about.part("queries")
        more = latest.integer("heads", heads, _MAX_HEADS)
        if more % heads:
            raise latest.fail("heads", f"a multiple of {heads}")
        number, dtype = latest.integer("count", 1, WINDOW), latest.choice("dtype", FLOATS)
        latest.close()
        queries = arrays.take(latest.where, dtype, whole.batch, more, number, dims[0])
    about.close()
    return Tail(keys, values, queries)


def _read_stock(layer: Any, about: Fields, arrays: ArrayReader, whole: Whole) -> None:
    shapes, dtypes = about.items("shapes"), about.pair("dtypes", FLOATS)
    if len(shapes) != 2:
        raise about.fail("shapes", "those of keys and values")
    length = about.integer("length", 1, (1 << 30) - 1)
    about.close()
    for shape in shapes:
        if (
            not isinstance(shape, list)
            or len(shape) != 4
            or any(type(x) is not int or not 1 <= x <= length * _MAX_DIM for x in shape)
            or shape[:3] != shapes[0][:3]
            or (whole.batch and shape[0] != whole.batch)
            or shape[2] > length
        ):
            raise about.fail("shapes", "those of keys and values")
    keys, values = (
        arrays.take(f"{about.where}, {what}", dtype, *shape)
        for what, dtype, shape in zip(("keys", "values"), dtypes, shapes, strict=True)
    )
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length
    elif shapes[0][2] != length:
        raise about.fail("length", "that of the keys")
