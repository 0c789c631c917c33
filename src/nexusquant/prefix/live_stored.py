"""The compressed past of one layer, in a stream and back."""

from __future__ import annotations

from typing import Any

from nexusquant.errors import FormatError
from nexusquant.prefix.arrays import FLOATS, ArrayReader, ArrayWriter, finite
from nexusquant.prefix.fields import Fields
from nexusquant.prefix.live_coded import Coder, read_coded, write_coded
from nexusquant.prefix.live_slots import (
    Shape,
    read_heads,
    read_slots,
    write_heads,
    write_slots,
)
from nexusquant.profile import SIDES
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens


def write_stored(stored: Stored, shape: Shape, out: ArrayWriter) -> dict[str, Any]:
    """A description, with the tensors."""
    sinks = None if stored.sinks is None else _write_exact(stored.sinks, shape, out)
    exact = [_write_exact(x, shape, out) for x in stored.body if isinstance(x, ExactTokens)]
    coded = [part for part in stored.body if isinstance(part, CodedTokens)]
    fresh = [] if stored.fresh is None else [stored.fresh]
    about = {"sinks": sinks, "exact": exact, **write_coded([*coded, *fresh], shape, out)}
    return about | ({"fresh": True} if fresh else {})


def read_stored(about: Fields, shape: Shape, coder: Coder, arrays: ArrayReader) -> Stored:
    """Inverse of `write_stored`, for descriptions that may be hostile."""
    sinks = None if about.is_null("sinks") else _read_exact(about.part("sinks"), shape, arrays)
    if sinks is not None and sinks.heads is not None:
        raise FormatError(f"{about.where}: sinks of some heads only.")
    exact = [_read_exact(part, shape, arrays) for part in about.parts("exact")]
    coded = read_coded(about, shape, coder, arrays)
    fresh = coded.pop() if "fresh" in about and about.flag("fresh") and coded else None
    near = coded[-1] if coded else None
    if fresh and not (near and fresh.heads is None and fresh.shares_centres(near)):
        raise FormatError(f"{about.where}: fresh tokens that are coded like no others.")
    about.close()
    wrong = exact if coder.config.codec == "e8" else coded
    body = coded or exact
    if wrong or (body and all(part.heads is not None for part in body)):
        raise FormatError(f"{about.where}: these parts are not of one layer.")
    return Stored(sinks, tuple(coded) or tuple(exact), fresh)


def _write_exact(part: ExactTokens, shape: Shape, out: ArrayWriter) -> dict[str, Any]:
    heads, count = part.kv_heads, part.slots.count
    dtypes = [
        out.put(x, shape.batch, heads, count, dim, check=finite)
        for x, dim in zip((part.keys, part.values), shape.dims, strict=True)
    ]
    slots = write_slots(part.slots, out, shape.batch)
    return {"dtypes": dtypes, "heads": write_heads(part.heads), "slots": slots}


def _read_exact(about: Fields, shape: Shape, arrays: ArrayReader) -> ExactTokens:
    heads = None if about.is_null("heads") else read_heads(about, shape)
    number = shape.heads if heads is None else len(heads)
    dtypes, slots = about.pair("dtypes", FLOATS), about.part("slots")
    count = slots.integer("count", 0, shape.stop)
    about.close()
    keys, values = (
        arrays.take(f"{about.where}, {side}s", dtype, shape.batch, number, count, dim, check=finite)
        for side, dtype, dim in zip(SIDES, dtypes, shape.dims, strict=True)
    )
    return ExactTokens(
        keys, values, read_slots(slots, arrays, shape.batch, number, shape.stop), heads
    )
