"""What an operator is given and gives: the interface of all implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, cast

from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.frame import KeyFrame
from nexusquant.layout import RowLayout
from nexusquant.mask import Mask
from nexusquant.math.e8 import Book
from nexusquant.slots import Slots


@dataclass(frozen=True)
class Space:
    """Code space of one layer's keys or values: x = mean + scale * (inverse @ y).

    Attributes:
        inverse: (heads or 1, dim, dim) fp32.
        mean: (batch or 1, heads or 1, 1, dim or 1).
        scale: (batch, heads, 1, dim or 1), None for 1.
    """

    inverse: Tensor
    mean: Tensor
    scale: Tensor | None

    def leave(self, y: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
        """Code space to vectors, (batch, heads, n, dim): of decoded tokens, or of sums of them
        with weights adding to 1. `heads`: which of the layer's they are, None for all."""
        x = y @ of_heads(self.inverse, heads).mT
        if self.scale is not None:
            x = x * of_heads(self.scale, heads).float()
        return x + of_heads(self.mean, heads).float()

    def same(self, other: Space) -> bool:
        """Whether both are one space, by identity of storage."""
        mine, theirs = ((s.inverse, s.mean, s.scale) for s in (self, other))
        return all(
            (a is None and b is None)
            or (a is not None and b is not None and a.data_ptr() == b.data_ptr())
            for a, b in zip(mine, theirs, strict=True)
        )


@dataclass(frozen=True)
class Entry:
    """The way into code space: y = forward @ ((x - mean) / scale).

    Attributes:
        forward: (heads or 1, dim, dim) fp32.
        mean: (batch or 1, heads or 1, 1, dim or 1).
        scale: (batch, heads or 1, 1, dim or 1), None for 1.
        empty: (batch or 1, heads or 1, tokens, 1) bool, vectors that mean nothing.
    """

    forward: Tensor
    mean: Tensor
    scale: Tensor | None = None
    empty: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """x (batch, heads, tokens, dim) of any dtype to code space, fp32."""
        y = x.float() - self.mean.float()
        if self.empty is not None:  # zeros would be far off where the mean is large
            y = y.masked_fill(self.empty, 0)
        if self.scale is not None:
            y = y / self.scale.float()
        return (self.forward @ y.mT).mT


def of_heads(x: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """x (..., heads or 1, n, m) of the layer at some heads."""
    return x if heads is None or x.shape[-3] == 1 else x[..., list(heads), :, :]


def spread(x: Tensor, heads: tuple[int, ...] | None, kv_heads: int, fill: float) -> Tensor:
    """x (batch, heads of a part, ...) to all `kv_heads` of the layer, `fill` in the others."""
    if heads is None:
        return x
    out = x.new_full((len(x), kv_heads, *x.shape[2:]), fill)
    out[:, list(heads)] = x
    return out


class Exact(Protocol):
    """Tokens as they are, keys post-RoPE. `heads`: which of the layer's, None for all."""

    @property
    def keys(self) -> Tensor:
        """(batch, heads, tokens, dim)."""

    @property
    def values(self) -> Tensor:
        """(batch, heads, tokens, value_dim)."""

    @property
    def slots(self) -> Slots:
        """Where they are."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Of the layer."""


class Coded(Protocol):
    """Tokens as codes; keys in the frame of the request."""

    @property
    def key_rows(self) -> Tensor:
        """(batch, row_bytes, tokens) uint8."""

    @property
    def value_rows(self) -> Tensor:
        """(batch, row_bytes, tokens) uint8."""

    @property
    def gains(self) -> Tensor:
        """(batch, heads, tokens) uint8, the keys' in the low four bits."""

    @property
    def slots(self) -> Slots:
        """Where they are."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Of the layer."""

    @property
    def layouts(self) -> tuple[RowLayout, RowLayout]:
        """Of keys and values."""

    @property
    def spaces(self) -> tuple[Space, Space]:
        """Of keys and values, for all heads of the layer."""

    @property
    def book(self) -> Book:
        """The codes."""


@dataclass(frozen=True)
class Request:
    """Attention of some queries to everything stored.

    Attributes:
        query: (batch, query_heads, q_len, dim), post-RoPE.
        parts: disjoint sets of tokens, one of them of all heads.
        mask: who may look at whom.
        frame: what coded keys are in.
        scaling: factor on the logits.
        softcap: logit soft cap.
        sink_logits: (query_heads,) learned extra logit without a value (gpt-oss `s_aux`).
    """

    query: Tensor
    parts: Sequence[Coded | Exact]
    mask: Mask
    frame: KeyFrame
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def stop(self) -> int:
        """All slots are below."""
        return max(part.slots.stop for part in self.parts)

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer.

        Raises:
            UnsupportedError: no part has all of them.
        """
        whole = next((part for part in self.parts if part.heads is None), None)
        if whole is None:
            raise UnsupportedError("attention to stored tokens needs one part of all heads.")
        return whole.gains.shape[1] if is_coded(whole) else exact(whole).keys.shape[1]


def is_coded(part: Coded | Exact) -> TypeGuard[Coded]:
    """Whether a part holds codes."""
    return hasattr(part, "gains")


def exact(part: Coded | Exact) -> Exact:
    """A part that is not coded."""
    assert not is_coded(part)
    return cast(Exact, part)  # a TypeGuard says nothing about the other case


@dataclass(frozen=True)
class Partial:
    """Attention over some tokens: output (b, h, g, q, dv) and log-sum-exp (b, h, g, q, 1)."""

    output: Tensor
    lse: Tensor


class Operator(Protocol):
    """Encodes, decodes and attends on one kind of device."""

    name: str

    def encode(
        self, x: Tensor, layout: RowLayout, book: Book, entry: Entry | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors to codes and gains.

        Args:
            x: (batch, heads, tokens, dim).
            entry: how they come into code space, None if they are there.

        Returns:
            rows (batch, row_bytes, tokens) and gains 0 to 15 (batch, heads, tokens), uint8.

        Raises:
            NonFiniteError: NaN, infinity, or vectors far larger than any gain.
        """

    def decode(self, rows: Tensor, gains: Tensor, layout: RowLayout, book: Book) -> Tensor:
        """Inverse of `encode`: (batch, heads, tokens, dim) fp32, zero where nothing is coded."""

    def decode_attention(self, request: Request) -> Partial:
        """softmax(scaling q k + mask) v over all tokens; zero and -inf where none is visible."""
