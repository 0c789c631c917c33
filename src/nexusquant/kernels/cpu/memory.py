"""Reading and writing memory by address, for kernels: nothing checks bounds."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nexusquant.kernels.cpu.compiled import inner
from nexusquant.kernels.cpu.simd import (
    BYTE,
    FLOAT,
    HALF,
    I32,
    LANES,
    WORD,
    F,
    M,
    call,
    pointer,
    read_vector,
)


@intrinsic
def keep(_: Any, array: Any) -> Any:
    """Does nothing. Numba frees an array behind its last use, and an address is none."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), lower


@intrinsic
def load(_: Any, address: Any, index: Any) -> Any:
    """16 float32 at address + 4 index."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return read_vector(builder, *args, FLOAT)

    return F(types.intp, types.intp), lower


@intrinsic
def load_bytes(_: Any, address: Any, index: Any) -> Any:
    """16 bytes at address + index, as int32 lanes of 0 to 255."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(read_vector(builder, *args, BYTE), I32.ir)

    return I32(types.intp, types.intp), lower


@intrinsic
def load_some_bytes(_: Any, address: Any, index: Any, lanes: Any) -> Any:
    """The same of the lanes set in a mask; the others are 0 and not read."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = ir.VectorType(BYTE, LANES)
        place = pointer(builder, args[0], args[1], BYTE, whole)
        values = (place, WORD(1), args[2], ir.Constant(whole, None))
        return builder.zext(call(builder, "llvm.masked.load.v16i8.p0", whole, values), I32.ir)

    return I32(types.intp, types.intp, M), lower


@intrinsic
def store(_: Any, address: Any, index: Any, value: Any) -> Any:
    """16 float32 to address + 4 index."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], args[1], FLOAT, F.ir)).align = 4
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, F), lower


@intrinsic
def store_bytes(_: Any, address: Any, index: Any, value: Any) -> Any:
    """The low 8 bits of int32 lanes to address + index."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = ir.VectorType(BYTE, LANES)
        place = pointer(builder, args[0], args[1], BYTE, whole)
        builder.store(builder.trunc(args[2], whole), place).align = 1
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, I32), lower


@intrinsic
def store_some_bytes(_: Any, address: Any, index: Any, value: Any, lanes: Any) -> Any:
    """The same of the lanes set in a mask; nothing else is written."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = ir.VectorType(BYTE, LANES)
        place = pointer(builder, args[0], args[1], BYTE, whole)
        values = (builder.trunc(args[2], whole), place, WORD(1), args[3])
        call(builder, "llvm.masked.store.v16i8.p0", ir.VoidType(), values)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, I32, M), lower


@intrinsic
def store_some(_: Any, address: Any, index: Any, value: Any, lanes: Any) -> Any:
    """16 float32 to address + 4 index, of the lanes set in a mask; nothing else is written."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = pointer(builder, args[0], args[1], FLOAT, F.ir)
        values = (args[2], place, WORD(4), args[3])
        call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), values)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, F, M), lower


@intrinsic
def lookup(_: Any, address: Any, index: Any) -> Any:
    """float32 at address + 4 index of every lane."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out = ir.Constant(F.ir, ir.Undefined)
        for lane in range(LANES):
            offset = builder.zext(builder.extract_element(args[1], WORD(lane)), ir.IntType(64))
            value = builder.load(pointer(builder, args[0], offset, FLOAT, FLOAT))
            out = builder.insert_element(out, value, WORD(lane))
        return out

    return F(types.intp, I32), lower


def _scattered(element: ir.Type) -> Any:
    """Stores of all lanes, each at an index of its own; of lanes with one index the last counts."""

    def typing(_: Any, address: Any, index: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            for lane in range(LANES):
                offset = builder.zext(builder.extract_element(args[1], WORD(lane)), ir.IntType(64))
                number = builder.extract_element(args[2], WORD(lane))
                number = builder.trunc(number, element) if element is BYTE else number
                builder.store(number, pointer(builder, args[0], offset, element, element))
            return context.get_dummy_value()

        return types.void(types.intp, I32, I32), lower

    return typing


@intrinsic
def scatter(_: Any, address: Any, index: Any, value: Any) -> Any:
    """int32 lanes to address + 4 index of every lane."""
    return _scattered(WORD)(_, address, index, value)


@intrinsic
def scatter_bytes(_: Any, address: Any, index: Any, value: Any) -> Any:
    """The low 8 bits of int32 lanes to address + index of every lane."""
    return _scattered(BYTE)(_, address, index, value)


def _scalar(element: ir.Type, kind: Any, write: bool) -> Any:
    """Load or store of one element."""

    def typing(_: Any, address: Any, index: Any, *value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            place = pointer(builder, args[0], args[1], element, element)
            if not write:
                return builder.load(place)
            builder.store(args[2], place)
            return context.get_dummy_value()

        where = (types.intp, types.intp)
        return (types.void(*where, kind) if write else kind(*where)), lower

    return typing


@intrinsic
def get_byte(_: Any, address: Any, index: Any) -> Any:
    """uint8 at address + index."""
    return _scalar(BYTE, types.uint8, False)(_, address, index)


@intrinsic
def get_short(_: Any, address: Any, index: Any) -> Any:
    """int16 at address + 2 index."""
    return _scalar(ir.IntType(16), types.int16, False)(_, address, index)


@intrinsic
def get_int(_: Any, address: Any, index: Any) -> Any:
    """int32 at address + 4 index."""
    return _scalar(WORD, types.int32, False)(_, address, index)


@intrinsic
def get_long(_: Any, address: Any, index: Any) -> Any:
    """int64 at address + 8 index."""
    return _scalar(ir.IntType(64), types.int64, False)(_, address, index)


@intrinsic
def get_float(_: Any, address: Any, index: Any) -> Any:
    """float32 at address + 4 index."""
    return _scalar(FLOAT, types.float32, False)(_, address, index)


@intrinsic
def get_half(_: Any, address: Any, index: Any) -> Any:
    """float16 at address + 2 index, as float32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.load(pointer(builder, *args, HALF, HALF)), FLOAT)

    return types.float32(types.intp, types.intp), lower


@intrinsic
def get_bfloat(_: Any, address: Any, index: Any) -> Any:
    """bfloat16 at address + 2 index, as float32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        short = ir.IntType(16)
        bits = builder.zext(builder.load(pointer(builder, *args, short, short)), WORD)
        return builder.bitcast(builder.shl(bits, WORD(16)), FLOAT)

    return types.float32(types.intp, types.intp), lower


@intrinsic
def put_int(_: Any, address: Any, index: Any, value: Any) -> Any:
    """int32 to address + 4 index."""
    return _scalar(WORD, types.int32, True)(_, address, index, value)


@intrinsic
def put_float(_: Any, address: Any, index: Any, value: Any) -> Any:
    """float32 to address + 4 index."""
    return _scalar(FLOAT, types.float32, True)(_, address, index, value)


@inner
def get_number(address, kind, index):
    """Element `index` of fp32, fp16 or bf16 (0, 1, 2) behind an address, as float32."""
    if kind == 0:
        return get_float(address, index)
    return get_half(address, index) if kind == 1 else get_bfloat(address, index)


@intrinsic
def float_of(_: Any, bits: Any) -> Any:
    """float32 that has the low 32 bits of an int64."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], WORD), FLOAT)

    return types.float32(types.int64), lower


@intrinsic
def call_task(_: Any, function: Any, arguments: Any, task: Any) -> Any:
    """function(arguments, task), of a function that is given by its address."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        long = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [long, long]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), lower
