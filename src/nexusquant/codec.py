"""`NexusQuantSimple`: compress a pair of K and V tensors, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import Chunk, compress
from nexusquant.config import CompressionConfig, resolve_config
from nexusquant.errors import ConfigError
from nexusquant.kernels.base import spread
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, Part


@dataclass(frozen=True)
class PackedKV:
    """K and V of one layer as `NexusQuantSimple.encode` stores them.

    Attributes:
        stored: the codes, scales and uncoded tokens.
        shape: (batch, kv_heads, tokens) of the source.
        dtype: of the source.
        source_elements: elements of K and V together.
    """

    stored: Stored
    shape: tuple[int, int, int]
    dtype: torch.dtype
    source_elements: int

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return storage_bytes(self.stored)

    @property
    def compression_ratio(self) -> float:
        """fp16 bytes of the source over `nbytes`."""
        return 2 * self.source_elements / self.nbytes

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per source element."""
        return 8 * self.nbytes / self.source_elements


class NexusQuantSimple:
    """The low-level codec: the same pipeline on bare tensors. Stateless, any batch size.

    Keys are coded as given: no rotary embedding is undone.

    Args:
        quality: preset name or `CompressionConfig`.
        **overrides: fields of `CompressionConfig`.

    Raises:
        ConfigError: unknown preset or field.

    Example:
        >>> import torch
        >>> from nexusquant import NexusQuantSimple
        >>> codec = NexusQuantSimple("lossless")
        >>> K, V = torch.randn(2, 4, 1000, 64), torch.randn(2, 4, 1000, 64)
        >>> packed = codec.encode(K, V)
        >>> packed.compression_ratio > 6
        True
        >>> K2, V2 = codec.decode(packed)
        >>> K2.shape == K.shape and bool((K2 - K).square().mean() < 0.4)
        True
    """

    def __init__(self, quality: str | CompressionConfig = "lossless", **overrides: Any) -> None:
        self.config = resolve_config(quality, **overrides)

    @torch.no_grad()
    def encode(self, keys: Tensor, values: Tensor, queries: Tensor | None = None) -> PackedKV:
        """Compress keys and values, each (batch, kv_heads, tokens, head_dim) floating point.

        Args:
            queries: (batch, query_heads, q_len, head_dim), of the last q_len tokens. Scorers look
                at them; without them the keys stand in for queries.

        Raises:
            ConfigError: shapes that do not fit together.
            UnsupportedError: head_dim is not a multiple of 8 (use codec="exact").
            NonFiniteError: NaN or infinity.
        """
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ConfigError(
                "keys and values must be (batch, kv_heads, tokens, head_dim) with equal batch,"
                f" heads and tokens; got {tuple(keys.shape)} and {tuple(values.shape)}."
            )
        if not (keys.is_floating_point() and values.is_floating_point()):
            raise ConfigError(
                f"keys and values must be floating point, got {keys.dtype} and {values.dtype}."
            )
        if not (keys.numel() and values.numel()):
            raise ConfigError(
                f"nothing to encode: shapes {tuple(keys.shape)} and {tuple(values.shape)}."
            )
        chunk = Chunk(
            keys, values, 0, queries=keys if queries is None else queries,
            scaling=keys.shape[-1] ** -0.5,
        )  # fmt: skip
        stored = compress(self.config, Stored(), chunk)
        shape = (keys.shape[0], keys.shape[1], keys.shape[2])
        return PackedKV(stored, shape, keys.dtype, keys.numel() + values.numel())

    def decode(self, packed: PackedKV) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, kv_heads, tokens, head_dim) in the source dtype.

        Evicted tokens are zero in both; `kept` says which are there.
        """
        out: list[Tensor] = []
        for part in packed.stored.parts():
            if isinstance(part, CodedTokens):
                keys, values = part.keys(), part.values()
            else:
                keys, values = part.keys, part.values
            where = _slots(part, packed)
            if not out:
                out = [
                    torch.zeros(*packed.shape, x.shape[-1], dtype=packed.dtype, device=x.device)
                    for x in (keys, values)
                ]
            for target, x in zip(out, (keys, values), strict=True):
                x = spread(x.to(packed.dtype), part.heads, packed.shape[1], 0)
                index = where.clamp(min=0)[..., None].expand_as(x)
                target.scatter_add_(2, index, x.masked_fill((where < 0)[..., None], 0))
        return out[0], out[1]

    def kept(self, packed: PackedKV) -> Tensor:
        """(batch, kv_heads, tokens) bool: which tokens were not evicted."""
        kept = torch.zeros(packed.shape, dtype=torch.uint8)
        for part in packed.stored.parts():
            where = _slots(part, packed).cpu()
            kept.scatter_add_(2, where.clamp(min=0), (where >= 0).to(torch.uint8))
        return kept.bool()


def _slots(part: Part, packed: PackedKV) -> Tensor:
    """Where a part's entries belong, (batch, kv_heads, n); -1 for none."""
    at = part.slots.positions(part.device).expand(packed.shape[0], part.kv_heads, -1)
    return spread(at, part.heads, packed.shape[1], -1)
