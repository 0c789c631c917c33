"""Coded tokens of one layer, in a stream and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nexusquant.config import CompressionConfig
from nexusquant.errors import FormatError, UnsupportedError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import GROUP
from nexusquant.prefix.arrays import ArrayReader, ArrayWriter, finite
from nexusquant.prefix.fields import Fields
from nexusquant.prefix.live_slots import (
    Shape,
    read_heads,
    read_slots,
    write_heads,
    write_slots,
)
from nexusquant.profile import SIDES, Profile
from nexusquant.quantizer import Basis, Centre, Orthonormal, Profiled, Quantizer
from nexusquant.tokens import CodedTokens

_CENTRES = ("float16", "float32")
_DIGITS = frozenset("012345678")
_TRANSFORMS = ("hadamard", "identity")
_PROFILE = "profile"


@dataclass(frozen=True)
class Coder:
    """What a layer's codes depend on, beside themselves."""

    config: CompressionConfig
    layer: int
    profile: Profile | None


# -- writing


def write_coded(parts: Sequence[CodedTokens], shape: Shape, out: ArrayWriter) -> dict[str, Any]:
    """A description of what parts share (`codings`) and of each, with the tensors."""
    codings: dict[tuple[int, ...], int] = {}
    about: dict[str, Any] = {"codings": [], "coded": []}
    for part in parts:
        if _key(part) not in codings:
            codings[_key(part)] = len(codings)
            about["codings"].append(_write_coding(part, shape, out))
    for index, part in enumerate(parts):
        more = (
            {"coding": codings[_key(part)], "rates": [_digits(x) for x in part.layouts]}
            if part.heads is None
            else {"heads": write_heads(part.heads), "like": _whole(parts, index)}
        )
        about["coded"].append(_write_part(part, shape, out) | more)
    return about


def _centres(part: CodedTokens) -> tuple[Centre, Centre]:
    return part.key_centre, part.value_centre


def _key(part: CodedTokens) -> tuple[int, ...]:
    """What parts that share their centres share, too."""
    return tuple(id(x) for centre in _centres(part) for x in (centre.mean, centre.scale))


def _write_coding(part: CodedTokens, shape: Shape, out: ArrayWriter) -> dict[str, Any]:
    bases = [_basis_name(q.basis) for q in (part.key_quantizer, part.value_quantizer)]
    if len(set(bases)) > 1:
        raise UnsupportedError(f"keys and values in different coordinates: {bases}.")
    sides = [
        _write_centre(centre, shape, dim, out)
        for centre, dim in zip(_centres(part), shape.dims, strict=True)
    ]
    return {"basis": bases[0], **dict(zip(SIDES, sides, strict=True))}


def _basis_name(basis: Basis) -> str:
    if isinstance(basis, Profiled):
        return _PROFILE
    assert isinstance(basis, Orthonormal)
    return basis.name


def _write_centre(centre: Centre, shape: Shape, dim: int, out: ArrayWriter) -> dict[str, Any]:
    about: dict[str, Any] = {"mean": None, "scale": None}
    if centre.mean is not None:
        about["mean"] = out.put(centre.mean, shape.batch, shape.heads, 1, dim)
    if centre.scale is not None:
        wide = centre.scale.shape[-1]
        name = out.put(centre.scale, shape.batch, shape.heads, 1, wide)
        about["scale"] = {"dtype": name, "dims": wide}
    return about


def _write_part(part: CodedTokens, shape: Shape, out: ArrayWriter) -> dict[str, Any]:
    key, value = part.layouts
    tensors = part.key_rows, part.value_rows, part.gains
    for x, rows in zip(tensors, (key.row_bytes, value.row_bytes, part.kv_heads), strict=True):
        out.put(x, shape.batch, rows, part.slots.count, along_tokens=True)
    return {"slots": write_slots(part.slots, out, shape.batch)}


def _digits(layout: RowLayout) -> list[str]:
    return ["".join(map(str, head)) for head in layout.rates]


def _whole(parts: Sequence[CodedTokens], index: int) -> int:
    """The part of all heads that a part of some is coded like."""
    part = parts[index]
    mine = part.key_quantizer, part.value_quantizer
    for i, other in enumerate(parts[:index]):
        theirs = (q.of_heads(part.heads) for q in (other.key_quantizer, other.value_quantizer))
        if other.heads is None and other.shares_centres(part) and tuple(theirs) == mine:
            return i
    raise UnsupportedError(f"tokens of heads {part.heads} are coded like those of no other part.")


# -- reading


@dataclass(frozen=True)
class _Coding:
    """Coordinates and centres of keys and values."""

    bases: tuple[Basis, Basis]
    centres: tuple[Centre, Centre]


def read_coded(about: Fields, shape: Shape, coder: Coder, arrays: ArrayReader) -> list[CodedTokens]:
    """Inverse of `write_coded`."""
    codings = [_read_coding(x, shape, coder, arrays) for x in about.parts("codings")]
    coded: list[CodedTokens] = []
    for part in about.parts("coded"):
        coded.append(_read_coded(part, coded, codings, shape, coder, arrays))
    return coded


def _read_coding(about: Fields, shape: Shape, coder: Coder, arrays: ArrayReader) -> _Coding:
    name = about.choice("basis", (_PROFILE, *_TRANSFORMS))
    if any(dim % GROUP for dim in shape.dims):
        raise FormatError(f"{about.where}: dimensions {shape.dims} cannot be coded.")
    key, value = (
        _profiled(coder, side, shape.heads, dim) if name == _PROFILE else Orthonormal(name, dim)
        for side, dim in zip(SIDES, shape.dims, strict=True)
    )
    centres = [
        _read_centre(about.part(side), shape, dim, arrays)
        for side, dim in zip(SIDES, shape.dims, strict=True)
    ]
    about.close()
    return _Coding((key, value), (centres[0], centres[1]))


def _profiled(coder: Coder, side: str, heads: int, dim: int) -> Profiled:
    """A side of the profile, which must fit: kernels rely on it."""
    if coder.profile is None or coder.layer not in coder.profile.layers:
        raise FormatError(f"layer {coder.layer} is coded with a profile that does not know it.")
    mean = getattr(coder.profile.layers[coder.layer], side).mean
    if tuple(mean.shape) != (heads, dim):
        raise FormatError(
            f"layer {coder.layer}: {heads} heads of dimension {dim} where the profile has"
            f" {tuple(mean.shape)}."
        )
    return Profiled(coder.profile, coder.layer, side)


def _read_centre(about: Fields, shape: Shape, dim: int, arrays: ArrayReader) -> Centre:
    lead = shape.batch, shape.heads, 1
    mean = scale = None
    if not about.is_null("mean"):
        dtype = about.choice("mean", _CENTRES)
        mean = arrays.take(f"{about.where}, mean", dtype, *lead, dim, check=finite)
    if not about.is_null("scale"):
        size = about.part("scale")
        dtype, wide = size.choice("dtype", _CENTRES), size.integer("dims", 1, dim)
        if wide not in (1, dim):
            raise size.fail("dims", f"1 or {dim}")
        size.close()
        scale = arrays.take(f"{about.where}, scale", dtype, *lead, wide, check=_positive)
    about.close()
    return Centre(mean, scale)


def _positive(x: Tensor) -> bool:
    return finite(x) and bool((x > 0).all())


def _read_coded(
    about: Fields,
    before: list[CodedTokens],
    codings: list[_Coding],
    shape: Shape,
    coder: Coder,
    arrays: ArrayReader,
) -> CodedTokens:
    if "like" in about:
        like = about.integer("like", 0, len(before) - 1)
        heads: tuple[int, ...] | None = read_heads(about, shape)
        whole = before[like]
        if whole.heads is not None:
            raise about.fail("like", "a part of all heads")
        pair = whole.key_quantizer, whole.value_quantizer
        centres = _centres(whole)
    else:
        coding = codings[about.integer("coding", 0, len(codings) - 1)]
        heads, centres = None, coding.centres
        pair = _read_quantizers(about, coding, shape, coder.config)
    key, value = (quantizer.of_heads(heads) for quantizer in pair)
    slots = about.part("slots")
    count = slots.integer("count", 0, shape.stop)
    about.close()
    sizes = key.layout.row_bytes, value.layout.row_bytes, key.layout.heads
    rows = [
        arrays.take(f"{about.where}, {what}", "uint8", shape.batch, n, count, along_tokens=True)
        for what, n in zip(("key rows", "value rows", "gains"), sizes, strict=True)
    ]
    at = read_slots(slots, arrays, shape.batch, key.layout.heads, shape.stop)
    return CodedTokens(rows[0], rows[1], rows[2], *centres, at, key, value)


def _read_quantizers(
    about: Fields, coding: _Coding, shape: Shape, config: CompressionConfig
) -> tuple[Quantizer, Quantizer]:
    sides = about.items("rates")
    if len(sides) != len(SIDES):
        raise about.fail("rates", "those of keys and of values")
    key, value = (
        Quantizer(_layout(about, rates, shape.heads, dim), basis, config.levels, config.overload)
        for rates, dim, basis in zip(sides, shape.dims, coding.bases, strict=True)
    )
    return key, value


def _layout(about: Fields, rates: Any, heads: int, dim: int) -> RowLayout:
    if (
        not isinstance(rates, list)
        or len(rates) != heads
        or not all(
            isinstance(x, str) and len(x) == dim // GROUP and _DIGITS.issuperset(x) for x in rates
        )
    ):
        raise about.fail("rates", f"{heads} strings of {dim // GROUP} digits from 0 to 8")
    return RowLayout(tuple(tuple(map(int, head)) for head in rates))
