"""Tuples of vectors, which stay in registers: rows of a small matrix, 16 columns at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nexusquant.kernels.cpu.simd import FLOAT, F, M, call, pointer, read_vector, spread


@intrinsic
def rows_of(_: Any, example: Any, value: Any) -> Any:
    """As many times the same vector as `example`, a tuple, has members."""
    kind = types.UniTuple(F, example.count)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, kind, [args[1]] * kind.count)

    return kind(example, F), lower


def _each(context: Any, builder: Any, kind: Any, rows: Any, change: Callable[..., Any]) -> Any:
    old = cgutils.unpack_tuple(builder, rows, kind.count)
    return context.make_tuple(builder, kind, [change(row, x) for row, x in enumerate(old)])


def _offset(builder: Any, index: Any, stride: Any, row: int) -> Any:
    return builder.add(index, builder.mul(stride, stride.type(row)))


@intrinsic
def rows_load(_: Any, rows: Any, address: Any, index: Any, stride: Any) -> Any:
    """Like `rows`, row r from address + 4 (index + r stride)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        before, place, index, stride = args
        return _each(
            context, builder, rows, before,
            lambda r, _: read_vector(builder, place, _offset(builder, index, stride, r), FLOAT),
        )  # fmt: skip

    return rows(rows, types.intp, types.intp, types.intp), lower


@intrinsic
def rows_store(_: Any, rows: Any, address: Any, index: Any, stride: Any) -> Any:
    """Row r to address + 4 (index + r stride)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row, x in enumerate(cgutils.unpack_tuple(builder, args[0], rows.count)):
            at = _offset(builder, args[2], args[3], row)
            builder.store(x, pointer(builder, args[1], at, FLOAT, F.ir)).align = 4
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, types.intp), lower


@intrinsic
def rows_add_scaled(_: Any, rows: Any, y: Any, address: Any, index: Any, stride: Any) -> Any:
    """Row r plus y times the float32 at address + 4 (index + r stride)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        before, y, place, index, stride = args

        def change(row: int, x: Any) -> Any:
            at = pointer(builder, place, _offset(builder, index, stride, row), FLOAT, FLOAT)
            return call(
                builder, "llvm.fma.v16f32", F.ir, (y, spread(builder, builder.load(at), F), x)
            )

        return _each(context, builder, rows, before, change)

    return rows(rows, F, types.intp, types.intp, types.intp), lower


@intrinsic
def rows_add_product(_: Any, rows: Any, y: Any, address: Any, index: Any, stride: Any) -> Any:
    """Row r plus y times the vector at address + 4 (index + r stride)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        before, y, place, index, stride = args

        def change(row: int, x: Any) -> Any:
            other = read_vector(builder, place, _offset(builder, index, stride, row), FLOAT)
            return call(builder, "llvm.fma.v16f32", F.ir, (y, other, x))

        return _each(context, builder, rows, before, change)

    return rows(rows, F, types.intp, types.intp, types.intp), lower


@intrinsic
def rows_scale_shift(_: Any, rows: Any, factor: Any, address: Any, index: Any, stride: Any) -> Any:
    """Row r times a vector, plus the float32 at address + 4 (index + r stride)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        before, factor, place, index, stride = args

        def change(row: int, x: Any) -> Any:
            at = pointer(builder, place, _offset(builder, index, stride, row), FLOAT, FLOAT)
            shift = spread(builder, builder.load(at), F)
            return call(builder, "llvm.fma.v16f32", F.ir, (x, factor, shift))

        return _each(context, builder, rows, before, change)

    return rows(rows, F, types.intp, types.intp, types.intp), lower


@intrinsic
def rows_choose(_: Any, lanes: Any, yes: Any, no: Any) -> Any:
    """Row by row, `yes` where the mask is set, else `no`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        other = cgutils.unpack_tuple(builder, args[2], yes.count)

        def change(row: int, x: Any) -> Any:
            return builder.select(args[0], x, other[row])

        return _each(context, builder, yes, args[1], change)

    return yes(M, yes, yes), lower
