"""Bytes: what is allocated, what fp16 would take, and the figures derived from the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch


def tensors_in(thing: Any) -> Iterable[torch.Tensor]:
    """Every tensor held by a dataclass, list, tuple or dict of them, depth first."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from tensors_in(getattr(thing, field.name))
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from tensors_in(item)


def storage_bytes(*things: Any) -> int:
    """Allocated bytes behind all tensors of `things`; storage shared between them counts once."""
    storages = {}
    for tensor in tensors_in(things):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def owned(x: torch.Tensor) -> torch.Tensor:
    """x in storage of its own: fused projections hand out views of queries, keys and values."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


@dataclass(frozen=True)
class CacheStats:
    """Size of one cache. All figures come from allocated storage.

    Attributes:
        nbytes: allocated bytes of everything the cache holds: codes, scales, means, positions,
            uncoded tokens, rotary rows, and a profile that no other cache shares.
        elements: elements of K and V that an uncompressed cache would hold now.
        tokens: logical length, in tokens per batch row, padding included.
        kept_tokens: entries stored per head, averaged over the compressed layers.
        layers, compressed_layers, exact_layers: how many there are of each.
    """

    nbytes: int
    elements: int
    tokens: int
    kept_tokens: float
    layers: int
    compressed_layers: int
    exact_layers: int

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the uncompressed cache in fp16."""
        return 2 * self.elements

    @property
    def compression_ratio(self) -> float:
        """fp16 bytes of the uncompressed cache over allocated bytes; nan for an empty cache."""
        return self.fp16_nbytes / self.nbytes if self.nbytes else float("nan")

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per element of the uncompressed cache; nan for an empty cache."""
        return 8 * self.nbytes / self.elements if self.elements else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.nbytes / 2**20:.2f} MiB for {self.tokens} tokens"
            f" ({self.kept_tokens:.0f} kept per head), {self.compression_ratio:.1f}x smaller than"
            f" fp16, {self.bits_per_element:.2f} bits/element,"
            f" {self.compressed_layers} of {self.layers} layers compressed"
        )
