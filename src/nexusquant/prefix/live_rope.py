"""The rotary tables of a cache, in streams and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.errors import FormatError, UnsupportedError
from nexusquant.hf.quirks import attention_modules
from nexusquant.hf.rope_tables import ModelRope
from nexusquant.math.rope import RopeTable, Span, rotated_dims
from nexusquant.prefix.arrays import FLOATS, ArrayReader, ArrayWriter, finite
from nexusquant.prefix.fields import Fields

_TILINGS = ("halves", "pairs", "once")
_MOST_DIMS = 1 << 16
_FAR = 1 << 30  # positions are less far from 0


def write_table(table: RopeTable, batch: int, out: ArrayWriter) -> dict[str, Any]:
    """A description, with the tensors."""
    if not isinstance(table.apply, ModelRope):
        raise UnsupportedError("a rotary function that is not the model's cannot be saved.")
    spans = [_write_span(span, batch, out) for span in table.spans]
    return {"module": table.apply.module_name, "batch": batch, "spans": spans}


def _write_span(span: Span, batch: int, out: ArrayWriter) -> dict[str, Any]:
    if span.rows is not None:
        cos, sin = span.rows
        rows, length, width = cos.shape
        dtypes = [out.put(x, rows, length, width) for x in (cos, sin)]
        about: dict[str, Any] = {"kind": "rows", "width": width, "dtypes": dtypes}
    else:
        assert span.positions is not None
        assert span.frequencies is not None
        rows, length = span.positions.shape
        count = len(span.frequencies)
        out.put(span.positions, rows, length)
        out.put(span.frequencies, count)
        about = {"kind": "positions", "frequencies": count, "tiling": span.tiling}
        about["scaling"] = float(span.scaling)
    if rows not in (1, batch):
        raise UnsupportedError(f"rotary rows of {rows} sequences in a cache of {batch}.")
    return about | {"rows": rows, "length": length}


def read_table(arrays: ArrayReader, model: nn.Module, batch: int, length: int) -> RopeTable:
    """Inverse of `write_table`, for a cache of `batch` rows and so many slots.

    The rotary function is one of the loaded model's own: a name in a file imports nothing.
    """
    about = arrays.about
    own = (ModelRope.of(module) for _, module in attention_modules(model))
    known = {rope.module_name: rope for rope in own if rope is not None}
    table = RopeTable(known[about.choice("module", known)])
    about.integer("batch", batch, batch)
    for span in about.parts("spans"):
        table.spans.append(_read_span(span, arrays, batch, length))
    arrays.close()
    widths = {span.width for span in table.spans}
    if len(widths) != 1 or table.length > length:
        raise FormatError(f"{about.where}: {table.length} slots of widths {sorted(widths)}.")
    return table


def _read_span(about: Fields, arrays: ArrayReader, batch: int, length: int) -> Span:
    rows, count = about.integer("rows", 1, batch), about.integer("length", 1, length)
    if rows not in (1, batch):
        raise about.fail("rows", f"1 or {batch}")
    if about.choice("kind", ("rows", "positions")) == "rows":
        width, dtypes = about.integer("width", 1, _MOST_DIMS), about.pair("dtypes", FLOATS)
        about.close()
        cos, sin = (
            arrays.take(f"{about.where}, {what}", dtype, rows, count, width, check=finite)
            for what, dtype in zip(("cos", "sin"), dtypes, strict=True)
        )
        return Span(rows=(cos, sin))
    number = about.integer("frequencies", 1, _MOST_DIMS)
    tiling, scaling = about.choice("tiling", _TILINGS), about.number("scaling", 1e-6, 1e6)
    about.close()
    positions = arrays.take(f"{about.where}, positions", "int32", rows, count, check=_near)
    frequencies = arrays.take(f"{about.where}, frequencies", "float32", number, check=finite)
    return Span(positions, frequencies, scaling, tiling)


def _near(positions: Tensor) -> bool:
    low, high = torch.aminmax(positions)
    return int(low) > -_FAR and int(high) < _FAR


def check_rotation(table: RopeTable, dim: int, where: str) -> None:
    """Raise `FormatError` if the rows of a table do not fit keys of `dim`."""
    width = table.spans[0].width
    try:
        rotated_dims(table.apply, width, dim)
    except (ValueError, TypeError, LookupError) as error:
        raise FormatError(f"{where}: rotary rows of width {width} for keys of {dim}.") from error
