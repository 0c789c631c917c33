"""Random chunks for `compress`, and what it stored, laid out by slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nexusquant.compressor import Chunk
from nexusquant.config import CompressionConfig
from nexusquant.kernels.base import spread
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens

CPU = torch.device("cpu")


def config(**settings: Any) -> CompressionConfig:
    return CompressionConfig(**{"scorer": "key_norm", "recent": 8, **settings})


def chunk(
    tokens: int = 60, *, batch: int = 2, heads: int = 2, dim: int = 32, start: int = 0, **more: Any
) -> Chunk:
    keys = torch.randn(batch, heads, tokens, dim) + 3 * torch.randn(heads, 1, dim)
    values = torch.randn(batch, heads, tokens, dim)
    queries = torch.randn(batch, 2 * heads, tokens, dim)
    return Chunk(keys, values, start, **{"queries": queries, "scaling": dim**-0.5, **more})


def uneven(tokens: int = 120, *, heads: int = 3, dim: int = 32, **more: Any) -> Chunk:
    """Keys of later heads are longer, so the key norm likes them less."""
    one = chunk(tokens, heads=heads, dim=dim, **more)
    keys = torch.randn(one.keys.shape) * torch.linspace(0.9, 1.1, heads)[:, None, None]
    return replace(one, keys=keys)


def shared(codec: str = "e8", **settings: Any) -> CompressionConfig:
    """Heads share their budget."""
    return config(**{"evict_ratio": 0.5, "head_safeguard": 0.3, "codec": codec, **settings})


def ragged(stored: Stored) -> list[CodedTokens | ExactTokens]:
    """Parts that hold only some heads."""
    return [part for part in stored.body if part.heads is not None]


def slots_of(part: CodedTokens | ExactTokens, batch: int, heads: int) -> list[list[list[int]]]:
    """Filled slots per batch row and head, ascending."""
    at = spread(part.slots.positions(CPU).expand(batch, part.kv_heads, -1), part.heads, heads, -1)
    return [[row[row >= 0].tolist() for row in heads] for heads in at]


def behind_sinks(stored: Stored) -> list[CodedTokens | ExactTokens]:
    """Tiers of the body and fresh tokens."""
    return [*stored.body, *([stored.fresh] if stored.fresh else [])]


def body_slots(stored: Stored, batch: int, heads: int) -> list[list[list[int]]]:
    """The same for all tiers of the body together, which must not overlap."""
    tiers = [slots_of(part, batch, heads) for part in behind_sinks(stored)]
    assert all(row == sorted(row) for tier in tiers for heads_ in tier for row in heads_)
    merged = [
        [sorted(slot for tier in tiers for slot in tier[b][h]) for h in range(heads)]
        for b in range(batch)
    ]
    assert all(len(set(row)) == len(row) for heads_ in merged for row in heads_)
    return merged


def decoded(part: CodedTokens | ExactTokens) -> tuple[Tensor, Tensor]:
    if isinstance(part, ExactTokens):
        return part.keys.float(), part.values.float()
    return part.keys(), part.values()


def dense(stored: Stored, shape: tuple[int, int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the body by slot, (batch, heads, slots, dim), NaN where there are none."""
    out = [torch.full((*shape[:2], shape[2] + 1, dim), torch.nan) for _ in range(2)]
    for part in behind_sinks(stored):
        at = part.slots.positions(CPU).expand(shape[0], part.kv_heads, -1)
        at = spread(at, part.heads, shape[1], -1)
        where = torch.where(at < 0, shape[2], at)[..., None].expand(-1, -1, -1, dim)
        for target, x in zip(out, decoded(part), strict=True):
            target.scatter_(2, where, spread(x, part.heads, shape[1], 0))
    return out[0][:, :, :-1], out[1][:, :, :-1]


def at_slots(x: Tensor, part: CodedTokens | ExactTokens, start: int = 0) -> Tensor:
    """The source of x (batch, heads, tokens, dim) at every stored entry."""
    index = part.slots.positions(CPU).expand(*x.shape[:2], -1) - start
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean() / (b - b.mean(2, keepdim=True)).square().mean())
