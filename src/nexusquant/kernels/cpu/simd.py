"""Vectors of 16 lanes as Numba types, so that a kernel says what every lane does.

LLVM splits them where the CPU's registers are narrower. Memory is addressed by an integer and an
index in elements; nothing checks bounds.

    F   16 x float32     I32   16 x int32     M   16 x bool     (F, ..., F)   rows, in registers
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16
BYTE, WORD, FLOAT, HALF = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.HalfType()

# 2^f = sum of c_k f^k for |f| <= 1/2
_EXP2 = (1.0, 0.693147207, 0.240226509, 0.0555032723, 0.00961805668, 0.00134004282, 0.000154614447)


class _Vector(types.Type):
    """A Numba type held in one LLVM vector."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=name)
        self.ir = ir.VectorType(element, LANES)


F = _Vector("float32x16", FLOAT)
I32 = _Vector("int32x16", WORD)
M = _Vector("boolx16", ir.IntType(1))


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.ir)


def pointer(builder: Any, address: Any, index: Any, element: ir.Type, whole: ir.Type) -> Any:
    """Pointer to `whole` at element `index` behind an integer address."""
    start = builder.inttoptr(address, element.as_pointer())
    return builder.bitcast(builder.gep(start, [index]), whole.as_pointer())


def read_vector(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    vector = ir.VectorType(element, LANES)
    value = builder.load(pointer(builder, address, index, element, vector))
    value.align = 1 if element is BYTE else 2 if element is HALF else 4
    return value


def read_fields(builder: Any, address: Any, first: int, count: int) -> list[Any]:
    """int64 numbers from number `first` behind an address on."""
    long = ir.IntType(64)
    return [
        builder.load(pointer(builder, address, long(first + i), long, long)) for i in range(count)
    ]


def spread(builder: Any, value: Any, kind: _Vector) -> Any:
    first = builder.insert_element(ir.Constant(kind.ir, ir.Undefined), value, WORD(0))
    zeros = ir.Constant(ir.VectorType(WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind.ir, ir.Undefined), zeros)


def call(builder: Any, name: str, result: ir.Type, args: Any) -> Any:
    kind = ir.FunctionType(result, [x.type for x in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def splat(_: Any, value: Any) -> Any:
    """A float32 or int32 in all lanes."""
    kind = F if value == types.float32 else I32

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, args[0], kind)

    return kind(types.float32 if kind is F else types.int32), lower


@intrinsic
def lane_numbers(_: Any) -> Any:
    """0 to 15."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(I32.ir, list(range(LANES)))

    return I32(), lower


@intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", F.ir, args)

    return F(F, F, F), lower


@intrinsic
def to_float(_: Any, value: Any) -> Any:
    """int32 to float32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], F.ir)

    return F(I32), lower


@intrinsic
def to_int(_: Any, value: Any) -> Any:
    """float32 to int32, towards zero."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], I32.ir)

    return I32(F), lower


@intrinsic
def choose(_: Any, lanes: Any, yes: Any, no: Any) -> Any:
    """`yes` where the mask is set, else `no`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return yes(M, yes, yes), lower


@intrinsic
def any_lane(_: Any, lanes: Any) -> Any:
    """Whether any lane of a mask is set."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned(
            "!=", builder.bitcast(args[0], ir.IntType(16)), ir.IntType(16)(0)
        )

    return types.boolean(M), lower


@intrinsic
def exp(_: Any, value: Any) -> Any:
    """e^x of x <= 88, to 2 units in the last place; 0 below -87, NaN of NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # 2^n 2^f with n the nearest integer and 2^f a polynomial (minimax on -1/2 to 1/2)
        def constant(x: float) -> Any:
            return ir.Constant(F.ir, [x] * LANES)

        low = builder.fcmp_ordered(">", args[0], constant(-87.0))
        x = builder.fmul(
            builder.select(low, args[0], constant(-87.0)), constant(1.4426950408889634)
        )
        n = call(builder, "llvm.rint.v16f32", F.ir, [x])
        f = builder.fsub(x, n)
        y = constant(_EXP2[-1])
        for c in reversed(_EXP2[:-1]):
            y = call(builder, "llvm.fma.v16f32", F.ir, [y, f, constant(c)])
        exponent = builder.shl(builder.fptosi(n, I32.ir), ir.Constant(I32.ir, [23] * LANES))
        scaled = builder.bitcast(builder.add(builder.bitcast(y, I32.ir), exponent), F.ir)
        known = builder.fcmp_ordered("ord", args[0], args[0])
        return builder.select(known, builder.select(low, scaled, constant(0.0)), args[0])

    return F(F), lower


def _unary(name: str) -> Callable[..., Any]:
    def typing(_: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return call(builder, f"llvm.{name}.v16f32", F.ir, args)

        return F(F), lower

    return typing


@intrinsic
def floor(_: Any, value: Any) -> Any:
    """Largest integer not above, as float32."""
    return _unary("floor")(_, value)


@intrinsic
def nearest(_: Any, value: Any) -> Any:
    """Nearest integer, the even one of two, as float32."""
    return _unary("rint")(_, value)


@intrinsic
def absolute(_: Any, value: Any) -> Any:
    """|x|."""
    return _unary("fabs")(_, value)


@intrinsic
def sqrt(_: Any, value: Any) -> Any:
    """Square root."""
    return _unary("sqrt")(_, value)


@intrinsic
def total(_: Any, value: Any) -> Any:
    """Sum of the lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(FLOAT, [FLOAT, F.ir])
        name = "llvm.vector.reduce.fadd.v16f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        zero = ir.Constant(FLOAT, -0.0)
        return builder.call(function, [zero, args[0]], fastmath=("reassoc",))

    return types.float32(F), lower


@intrinsic
def largest(_: Any, value: Any) -> Any:
    """Maximum of the lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.vector.reduce.fmax.v16f32", FLOAT, args)

    return types.float32(F), lower


def _pairwise(op: Any, kind: _Vector, result: _Vector, lower: Callable[..., Any]) -> None:
    """Teach Numba an operator on two vectors of one kind."""

    @type_callable(op)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            return result if a == kind and b == kind else None

        return typer

    @lower_builtin(op, kind, kind)
    def lowering(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return lower(builder, *args)


for _op, _floats, _ints in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
    (operator.and_, None, "and_"),
    (operator.or_, None, "or_"),
    (operator.xor, None, "xor"),
    (operator.rshift, None, "lshr"),  # logical: fields of a word are unsigned
    (operator.lshift, None, "shl"),
):
    if _floats:
        _pairwise(_op, F, F, lambda builder, a, b, name=_floats: getattr(builder, name)(a, b))
    if _ints:
        _pairwise(_op, I32, I32, lambda builder, a, b, name=_ints: getattr(builder, name)(a, b))
for _op, _sign in (
    (operator.lt, "<"),
    (operator.gt, ">"),
    (operator.le, "<="),
    (operator.eq, "=="),
):
    _pairwise(_op, F, M, lambda builder, a, b, s=_sign: builder.fcmp_ordered(s, a, b))
    _pairwise(_op, I32, M, lambda builder, a, b, s=_sign: builder.icmp_signed(s, a, b))
_pairwise(operator.and_, M, M, lambda builder, a, b: builder.and_(a, b))
_pairwise(operator.or_, M, M, lambda builder, a, b: builder.or_(a, b))


@type_callable(operator.invert)
def _type_invert(context: Any) -> Any:
    return lambda lanes: M if lanes == M else None


@lower_builtin(operator.invert, M)
def _invert(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.not_(args[0])
