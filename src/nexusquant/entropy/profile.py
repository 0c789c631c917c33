"""Storage profiles: the coordinates, and the statistics in them, that stored prefixes are coded by.

Another thing than the profile of a live cache (`nexusquant.profile`), as nothing has to be read at
random: one transform over all KV heads of a layer, keys without any RoPE, prediction from the token
before, and the frequencies of all symbols.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nexusquant.entropy.classes import CLASSES
from nexusquant.entropy.symbols import SYMBOLS, Tables
from nexusquant.errors import ProfileError
from nexusquant.math.e8 import GROUP

FORMAT = 1
OCTAVE = 12
"""Levels, and step numbers, per factor 2."""
FINEST, COARSEST = -20 * OCTAVE, 4 * OCTAVE
"""Step numbers s that a profile knows the rate of; the step is 2^(s / OCTAVE)."""
LEVELS = 60 * OCTAVE
"""Levels are between minus this and this: squares of such deviations are fp32 numbers."""


@dataclass(frozen=True)
class StoreSide:
    """The keys or the values of one layer, all KV heads side by side: dim = kv_heads x head_dim.

    y = forward (x - mean) has uncorrelated coordinates in which error matters equally (across
    layers and sides, too); they are ordered by falling variance.

    Attributes:
        forward: (dim, dim) fp16, times `scale`.
        scale: of `forward`.
        mean: (dim,) fp32.
        decay: (dim,) fp16, correlation of a coordinate with that of the token before.
        level: (2, dim) int16, OCTAVE log2 of the deviation: of a page's first token, of what is
            left of the others after prediction.
        group: (2, dim / 8) int16, the same of groups of 8.
    """

    forward: Tensor
    scale: Tensor
    mean: Tensor
    decay: Tensor
    level: Tensor
    group: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """`forward` in fp32."""
        return self.forward.float() * self.scale

    @cached_property
    def inverse(self) -> Tensor:
        """Of `matrix`, fp32.

        Raises:
            ProfileError: it has none.
        """
        try:
            found = torch.linalg.inv(self.forward.double() * self.scale.double()).float()
        except RuntimeError as error:
            raise ProfileError(
                f"a transform of the storage profile is singular ({error})"
            ) from error
        if not bool(torch.isfinite(found).all()):
            raise ProfileError("a transform of the storage profile is all but singular: damaged.")
        return found


@dataclass(frozen=True)
class QueryMoments:
    """What is known of the queries of one layer, without RoPE.

    Attributes:
        mean: (query_heads, dim) fp32.
        covariance: (query_heads, dim, dim) bf16.
    """

    mean: Tensor
    covariance: Tensor


SIDES = ("key", "value")
_FIELDS = tuple(StoreSide.__dataclass_fields__)


@dataclass(frozen=True, eq=False, repr=False)
class StoreProfile:
    """Of a model.

    Attributes:
        fingerprint: of the model's config and weights.
        source: what text it was built from, for people.
        tokens: how many.
        shapes: per layer, (kv_heads, key dim, value dim).
        layers: per layer, keys and values.
        queries: per layer.
        tables: symbol frequencies.
        rates: (n,) fp32, bits per element that steps FINEST, FINEST + OCTAVE, ... took.
    """

    fingerprint: str
    source: str
    tokens: int
    shapes: dict[int, tuple[int, int, int]]
    layers: dict[int, tuple[StoreSide, StoreSide]]
    queries: dict[int, QueryMoments]
    tables: Tables
    rates: Tensor

    def __repr__(self) -> str:
        return f"StoreProfile({self.fingerprint}, {len(self.layers)} layers, {self.source!r})"

    def rate(self, step: int, extra: Tensor) -> float:
        """Bits per element that a step number takes of text like the profile's.

        Args:
            extra: (n,) int16, what is added to it for every layer and token.
        """
        kinds, counts = extra.unique(return_counts=True)
        at = ((step + kinds).float() - FINEST).clamp(0, COARSEST - FINEST) / OCTAVE
        left = at.long().clamp(max=len(self.rates) - 2)
        each = torch.lerp(self.rates[left], self.rates[left + 1], at - left)
        return float(each @ (counts / counts.sum()))

    def step_for(self, bits: float, extra: Tensor) -> int:
        """The finest step number whose `rate` is `bits` at most."""
        low, high = FINEST, COARSEST
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.rate(middle, extra) <= bits else (middle + 1, high)
        return low

    @cached_property
    def digest(self) -> str:
        """32 hex digits of everything that decoding depends on."""
        return hashlib.blake2b(self.to_bytes(), digest_size=16).hexdigest()

    @property
    def nbytes(self) -> int:
        """Of the tensors as stored."""
        return sum(x.nbytes for x in self._tensors().values())

    def to_bytes(self) -> bytes:
        """As a safetensors file, the same bytes for the same profile."""
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "tokens": self.tokens,
            "shapes": {str(i): list(shape) for i, shape in sorted(self.shapes.items())},
        }
        return save_tensors(
            self._tensors(), {"nexusquant-store": json.dumps(header, sort_keys=True)}
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"{index}.{name}.{key}": getattr(side, key).contiguous()
            for index, layer in sorted(self.layers.items())
            for name, side in zip(SIDES, layer, strict=True)
            for key in _FIELDS
        }
        for index, queries in sorted(self.queries.items()):
            for key, x in vars(queries).items():
                tensors[f"{index}.query.{key}"] = x.contiguous()
        counts = {"values": self.tables.values, "cosets": self.tables.cosets}
        for name, array in counts.items():  # older safetensors do not know uint16
            tensors[f"tables.{name}"] = torch.from_numpy(array.view(np.int16))
        return {**tensors, "rates": self.rates}


def profile_from_bytes(data: bytes, where: str = "the storage profile") -> StoreProfile:
    """Inverse of `StoreProfile.to_bytes`.

    Raises:
        ProfileError: something else, another version, or damaged.
    """
    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["nexusquant-store"])
        if header["format"] != FORMAT:
            raise ProfileError(
                f"{where} has format {header['format']}, this version of nexusquant reads"
                f" {FORMAT}. Build it again with `nexusquant calibrate --store`."
            )
        shapes = {int(i): _shape(s) for i, s in header["shapes"].items()}
        layers = {
            i: (_side(tensors, f"{i}.key", h, k), _side(tensors, f"{i}.value", h, v))
            for i, (h, k, v) in shapes.items()
        }
        queries = {i: _queries(tensors, i, heads, key) for i, (heads, key, _) in shapes.items()}
        values, cosets = (
            tensors.pop(f"tables.{name}").numpy().view(np.uint16) for name in ("values", "cosets")
        )
        rates = tensors.pop("rates").float()
        _check_tables(values, cosets, rates)
        return StoreProfile(
            str(header["fingerprint"]), str(header["source"]), int(header["tokens"]),
            shapes, layers, queries, Tables(values, cosets), rates,
        )  # fmt: skip
    except ProfileError:
        raise
    except (
        SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError,
        ArithmeticError, RuntimeError,
    ) as error:  # fmt: skip
        raise ProfileError(f"{where} is not a storage profile, or damaged ({error}).") from error


def _shape(given: Any) -> tuple[int, int, int]:
    heads, key, value = (int(x) for x in given)
    if not 0 < heads * max(key, value) <= 1 << 16 or min(key, value) <= 0:
        raise ValueError(f"shape {given}")
    return heads, key, value


def _side(tensors: dict[str, Tensor], prefix: str, heads: int, dim: int) -> StoreSide:
    side = StoreSide(*(tensors[f"{prefix}.{name}"] for name in _FIELDS))
    size = heads * dim
    shapes = [(size, size), (), (size,), (size,), (2, size), (2, size // GROUP)]
    dtypes = [torch.float16, torch.float32, torch.float32, torch.float16, torch.int16, torch.int16]
    for name, shape, dtype in zip(_FIELDS, shapes, dtypes, strict=True):
        x = getattr(side, name)
        if tuple(x.shape) != shape or x.dtype != dtype or not bool(torch.isfinite(x).all()):
            raise ValueError(f"{prefix}.{name} has a wrong shape, dtype or value")
    loudest = max(int(x.int().abs().max()) for x in (side.level, side.group))
    bounded = bool((side.decay.abs() < 1).all()) and loudest <= LEVELS
    if not bounded or float(side.scale) <= 0 or size % GROUP:
        raise ValueError(f"{prefix} has wrong values")
    return side


def _queries(tensors: dict[str, Tensor], index: int, heads: int, dim: int) -> QueryMoments:
    mean, covariance = (tensors[f"{index}.query.{name}"] for name in ("mean", "covariance"))
    count = len(mean)
    fits = (
        count
        and count % heads == 0
        and (mean.shape, covariance.shape) == ((count, dim), (count, dim, dim))
        and (mean.dtype, covariance.dtype) == (torch.float32, torch.bfloat16)
    )
    if not fits or not bool(torch.isfinite(mean).all() & torch.isfinite(covariance).all()):
        raise ValueError(f"the queries of layer {index} have a wrong shape, dtype or value")
    return QueryMoments(mean, covariance)


def _check_tables(values: NDArray[Any], cosets: NDArray[Any], rates: Tensor) -> None:
    expected = {
        "values": (values.shape, (2, CLASSES, 2, SYMBOLS)),
        "cosets": (cosets.shape, (2, CLASSES, 2)),
        "rates": (tuple(rates.shape), ((COARSEST - FINEST) // OCTAVE + 1,)),
    }
    for name, (found, wanted) in expected.items():
        if tuple(found) != wanted:
            raise ValueError(f"{name} has shape {tuple(found)} instead of {wanted}")
    falling = bool(torch.isfinite(rates).all()) and bool((rates.diff() <= 0).all())
    if int(values.min()) < 1 or int(cosets.min()) < 1 or not falling:
        raise ValueError("the tables have wrong values")
    if not math.isfinite(float(rates.sum())):
        raise ValueError("the rates have wrong values")
