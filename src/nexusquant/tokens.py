"""Stored tokens of one layer, uncoded (`ExactTokens`) or as codes (`CodedTokens`).

All containers are immutable; `append` and `map` return new ones, so a reader's view never changes.
Where heads keep different numbers of tokens, a layer also has parts that hold only some `heads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nexusquant.kernels.base import Space
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import Book
from nexusquant.quantizer import Centre, Quantizer
from nexusquant.slots import BatchFn, Slots


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, or unchanged if that would overflow, or if all of it would underflow."""
    y = x.to(dtype)
    fits = dtype == x.dtype or bool(torch.isfinite(y).all() & (y.any() | ~x.any()))
    return y if fits else x


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (batch, heads, tokens, dim) at index (batch, heads or 1, n); -1 reads token 0."""
    index = index.clamp(min=0).expand(-1, x.shape[1], -1)
    dim, strides = x.shape[-1], x.stride()
    if not x.numel() or strides[3] != 1 or any(stride % dim for stride in strides[:3]):
        return x.gather(2, index[..., None].expand(-1, -1, -1, dim))
    # Whole rows are copied several times faster than elements are gathered.
    steps = [stride // dim for stride in strides[:3]]
    rows = 1 + sum((n - 1) * step for n, step in zip(x.shape[:3], steps, strict=True))
    row, head = (torch.arange(n, device=x.device) for n in x.shape[:2])
    first = (row[:, None] * steps[0] + head * steps[1])[..., None]
    return embedding(index * steps[2] + first, x.as_strided((rows, dim), (dim, 1)))


@dataclass(frozen=True)
class ExactTokens:
    """Tokens stored as they are: keys (post-RoPE) and values, (batch, kv_heads, tokens, dim).

    Attributes:
        heads: which KV heads of the layer it holds, None for all.
    """

    keys: Tensor
    values: Tensor
    slots: Slots
    heads: tuple[int, ...] | None = None

    @property
    def kv_heads(self) -> int:
        """Number of KV heads that it holds."""
        return self.keys.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.keys.device

    @staticmethod
    def select(
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        start: int,
        dtype: torch.dtype,
        heads: tuple[int, ...] | None = None,
    ) -> ExactTokens:
        """The tokens at `index` (batch, heads or 1, n; -1 empty) of a chunk from slot `start`."""
        empty = (index < 0)[..., None]  # zeros, as the token read instead may be NaN padding
        keys, values = (
            narrowed(gather_tokens(x, index).masked_fill(empty, 0), dtype).contiguous()
            for x in (keys, values)
        )
        slots = Slots.of(torch.where(index < 0, -1, index + start))
        return ExactTokens(keys, values, slots, heads)

    def continues(self, other: ExactTokens) -> bool:
        """Whether this may be appended to `other`."""
        return self.heads == other.heads

    def append(self, other: ExactTokens) -> ExactTokens:
        """The tokens of both; `other` lies behind."""
        batch = self.keys.shape[0]
        return ExactTokens(
            torch.cat([self.keys, other.keys.to(self.keys.dtype)], 2),
            torch.cat([self.values, other.values.to(self.values.dtype)], 2),
            self.slots.append(other.slots, batch),
            self.heads,
        )

    def drop(self, count: int) -> ExactTokens:
        """Without the first `count` entries, in storage of its own."""
        keys, values = (x[:, :, count:].clone() for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values, slots=self.slots.drop(count))

    def pick(self, index: Tensor) -> ExactTokens:
        """Only the entries at `index` (batch, kv_heads, n), ascending."""
        at = self.slots.positions(self.device).expand(*index.shape[:2], -1).gather(2, index)
        keys, values = (gather_tokens(x, index) for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values, slots=Slots.of(at))

    def map(self, fn: BatchFn) -> ExactTokens:
        """Apply a batch operation (reorder, repeat, select) to everything stored."""
        return replace(self, keys=fn(self.keys), values=fn(self.values), slots=self.slots.map(fn))


@dataclass(frozen=True)
class CodedTokens:
    """Tokens stored as codes. Keys are in the frame of `KeyFrame`; centres are per batch row.

    Attributes:
        key_rows, value_rows: (batch, row_bytes, tokens) uint8; entry i holds the i-th token of
            every head, which need not be the same token (`slots`).
        gains: (batch, kv_heads, tokens) uint8, the keys' in the low four bits.
        key_centre, value_centre: of all heads, shared by parts that were coded alike.
        key_quantizer, value_quantizer: of the heads that are here.
    """

    key_rows: Tensor
    value_rows: Tensor
    gains: Tensor
    key_centre: Centre
    value_centre: Centre
    slots: Slots
    key_quantizer: Quantizer
    value_quantizer: Quantizer

    @staticmethod
    def encode(
        keys: Tensor,
        values: Tensor,
        slots: Slots,
        centres: tuple[Centre, Centre],
        quantizers: tuple[Quantizer, Quantizer],
    ) -> CodedTokens:
        """Keys (in their frame) and values, each (batch, kv_heads, tokens, dim), at `slots`.

        The heads are those of the quantizers.
        """
        empty = (slots.positions(keys.device) < 0)[..., None]
        key_rows, key_gains = quantizers[0].encode(keys, centres[0], empty)
        value_rows, value_gains = quantizers[1].encode(values, centres[1], empty)
        return CodedTokens(
            key_rows, value_rows, key_gains | (value_gains << 4), *centres, slots, *quantizers
        )

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Which KV heads of the layer it holds, None for all."""
        return self.key_quantizer.heads

    @property
    def kv_heads(self) -> int:
        """Number of KV heads that it holds."""
        return self.gains.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.gains.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.gains.device

    def part(self, tokens: slice) -> CodedTokens:
        """Views of some entries; the slots stay as they are."""
        return replace(
            self,
            key_rows=self.key_rows[:, :, tokens],
            value_rows=self.value_rows[:, :, tokens],
            gains=self.gains[:, :, tokens],
        )

    def keys(self) -> Tensor:
        """Decoded keys in their frame, (batch, kv_heads, tokens, dim) fp32."""
        return self.key_quantizer.decode(self.key_rows, self.gains & 15, self.key_centre)

    def values(self) -> Tensor:
        """Decoded values, (batch, kv_heads, tokens, dim) fp32."""
        return self.value_quantizer.leave(self.value_coordinates(), self.value_centre)

    def value_coordinates(self) -> Tensor:
        """Decoded values still in code space."""
        return self.value_quantizer.coordinates(self.value_rows, self.gains >> 4)

    @property
    def layouts(self) -> tuple[RowLayout, RowLayout]:
        """Of the rows of keys and values."""
        return self.key_quantizer.layout, self.value_quantizer.layout

    @property
    def book(self) -> Book:
        """The codes of both."""
        return self.key_quantizer.book

    @property
    def spaces(self) -> tuple[Space, Space]:
        """Code spaces of keys and values, of all heads of the layer."""
        return (
            self.key_quantizer.space(self.key_centre, self.device),
            self.value_quantizer.space(self.value_centre, self.device),
        )

    def continues(self, other: CodedTokens) -> bool:
        """Whether this may be appended to `other`: the same heads, coded alike."""
        mine = self.key_quantizer, self.value_quantizer
        alike = mine == (other.key_quantizer, other.value_quantizer)
        return alike and self.shares_centres(other)

    def shares_centres(self, other: CodedTokens) -> bool:
        """Whether both are relative to the same centres, by identity."""
        pairs = (self.key_centre, other.key_centre), (self.value_centre, other.value_centre)
        return all(a.mean is b.mean and a.scale is b.scale for a, b in pairs)

    def append(self, other: CodedTokens) -> CodedTokens:
        """The tokens of both, which must share centres and quantizers; `other` lies behind."""
        batch = self.gains.shape[0]
        return replace(
            self,
            key_rows=torch.cat([self.key_rows, other.key_rows], 2),
            value_rows=torch.cat([self.value_rows, other.value_rows], 2),
            gains=torch.cat([self.gains, other.gains], 2),
            slots=self.slots.append(other.slots, batch),
        )

    def drop(self, count: int) -> CodedTokens:
        """Without the first `count` entries, in storage of its own."""
        return replace(self.part(slice(count, None)).owned(), slots=self.slots.drop(count))

    def owned(self) -> CodedTokens:
        """In storage of its own."""
        return self._tensors(torch.clone)

    def pick(self, index: Tensor) -> CodedTokens:
        """Only the entries at `index` (batch, kv_heads, n), ascending: another choice per head."""
        at = self.slots.positions(self.device).expand(*index.shape[:2], -1).gather(2, index)

        def rows(x: Tensor, layout: RowLayout) -> Tensor:
            return x.gather(2, index[:, layout.head_of_byte(x.device)])

        return replace(
            self,
            key_rows=rows(self.key_rows, self.key_quantizer.layout),
            value_rows=rows(self.value_rows, self.value_quantizer.layout),
            gains=self.gains.gather(2, index),
            slots=Slots.of(at),
        )

    def map(self, fn: BatchFn) -> CodedTokens:
        """Apply a batch operation (reorder, repeat, select) to everything stored."""
        return replace(
            self._tensors(fn),
            key_centre=self.key_centre.map(fn),
            value_centre=self.value_centre.map(fn),
            slots=self.slots.map(fn),
        )

    def _tensors(self, fn: BatchFn) -> CodedTokens:
        return replace(
            self,
            key_rows=fn(self.key_rows),
            value_rows=fn(self.value_rows),
            gains=fn(self.gains),
        )


Part = CodedTokens | ExactTokens
Tokens = TypeVar("Tokens", CodedTokens, ExactTokens)


def appended(old: Sequence[Tokens], new: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Every new part behind the old one that it continues; those that continue none come last."""
    left = list(new)
    parts: list[Tokens] = []
    for part in old:
        at = next((i for i, more in enumerate(left) if more.continues(part)), None)
        parts.append(part if at is None else part.append(left.pop(at)))
    return tuple(parts + left)


def count_heads(parts: Iterable[Part]) -> int:
    """KV heads of the layer, one of whose `parts` must hold all of them."""
    return next(part.kv_heads for part in parts if part.heads is None)
