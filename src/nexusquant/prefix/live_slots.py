"""Which slots and heads a set of tokens occupies, in a stream and back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import FormatError
from nexusquant.prefix.arrays import ArrayReader, ArrayWriter
from nexusquant.prefix.fields import Fields
from nexusquant.slots import Slots

_GAPS = ("uint8", "int16", "int32")
_ONES = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8)


@dataclass(frozen=True)
class Shape:
    """What all tensors of a layer have in common.

    Attributes:
        dims: of keys and of values.
        stop: all stored slots are below.
    """

    batch: int
    heads: int
    dims: tuple[int, int]
    stop: int


def write_slots(slots: Slots, out: ArrayWriter, batch: int) -> dict[str, Any]:
    """A description, with the one tensor there may be."""
    about: dict[str, Any] = {"count": slots.count, "start": slots.start, "kind": "run"}
    if slots.stored is None:
        return about
    about |= {"last": slots.last, "rows": slots.stored.shape[1]}
    if slots.gaps is not None:
        dtype = out.put(slots.gaps, batch, about["rows"], slots.count)
        return about | {"kind": "gaps", "dtype": dtype}
    out.put(slots.stored, batch, about["rows"], _width(slots.start, slots.last))
    return about | {"kind": "bits"}


def read_slots(about: Fields, arrays: ArrayReader, batch: int, heads: int, stop: int) -> Slots:
    """Slots of a part with so many heads, all of them below `stop`."""
    start, count = about.integer("start", 0, stop), about.integer("count", 0, stop)
    kind = about.choice("kind", ("run", "gaps", "bits"))
    if kind == "run":
        if start + count > stop:
            raise FormatError(f"{about.where}: slots {start} to {start + count - 1} of {stop}.")
        about.close()
        return Slots(start, count)
    last, rows = about.integer("last", -1, stop - 1), about.integer("rows", 1, heads)
    if rows not in (1, heads):
        raise about.fail("rows", f"1 or {heads}")
    if kind == "gaps":
        dtype = about.choice("dtype", _GAPS)
        about.close()

        def ascending(gaps: Tensor) -> bool:
            largest = start - 1 + int(gaps.sum(-1, dtype=torch.int64).max()) if count else -1
            return not count or (int(gaps.min()) >= 0 and largest <= last)

        gaps = arrays.take(f"{about.where}, gaps", dtype, batch, rows, count, check=ascending)
        return Slots(start, count, gaps=gaps, last=last)
    if last < start:
        raise about.fail("last", f"at least {start}")
    about.close()
    unused = 7 - (last - start) % 8  # bits of the last byte

    def fitting(bitmap: Tensor) -> bool:
        ones = torch.nn.functional.embedding(bitmap.int(), _ONES[:, None])[..., 0]
        within = bool((bitmap[..., -1] >> (8 - unused) == 0).all()) if unused else True
        return within and int(ones.sum(-1, dtype=torch.int64).max()) <= count

    width = _width(start, last)
    bitmap = arrays.take(f"{about.where}, bits", "uint8", batch, rows, width, check=fitting)
    return Slots(start, count, bitmap=bitmap, last=last)


def _width(start: int, last: int) -> int:
    """Bytes of a bitmap."""
    return -(-(last - start + 1) // 8)


def write_heads(heads: tuple[int, ...] | None) -> list[int] | None:
    """In JSON."""
    return None if heads is None else list(heads)


def read_heads(about: Fields, shape: Shape) -> tuple[int, ...]:
    """Which heads of the layer a part holds."""
    heads = about.items("heads")
    known = all(type(x) is int and 0 <= x < shape.heads for x in heads)
    if not heads or not known or any(a >= b for a, b in pairwise(heads)):
        raise about.fail("heads", f"null or ascending numbers below {shape.heads}")
    return tuple(heads)
