"""Bytes against an independent walk over storages, and the figures derived from them."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nexusquant.accounting import CacheStats, storage_bytes, tensors_in
from nexusquant.codec import NexusQuantSimple


@dataclass(frozen=True)
class Box:
    inner: Any
    label: str = "a label"


def walk(*roots: Any) -> int:
    """Allocated bytes by following the garbage collector's references instead of fields."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (dict, list, tuple)) or hasattr(thing, "__dataclass_fields__"):
            todo += gc.get_referents(thing)
    return sum(found.values())


def test_views_count_the_storage_behind_them_once() -> None:
    base = torch.zeros(100, dtype=torch.float32)
    assert storage_bytes(base[:3]) == 400
    assert storage_bytes(base[:3], base[50:], [base.view(10, 10).T], {"x": Box((base,))}) == 400
    assert storage_bytes(base, base.clone()) == 800
    assert storage_bytes(base.expand(1000, 100)) == 400


def test_nested_containers_against_another_walk() -> None:
    shared = torch.zeros(7, dtype=torch.float16)
    tree = [
        Box([torch.zeros(3, 5), None, "text", 7]),
        {"a": (shared, shared[2:]), "b": Box(Box(torch.zeros(2, dtype=torch.uint8)))},
        torch.zeros(0),
    ]
    assert storage_bytes(tree) == walk(tree) == 60 + 14 + 2
    assert len(list(tensors_in(tree))) == 5


def test_nothing_is_nothing() -> None:
    assert storage_bytes() == storage_bytes(None, 3, "x", [], Box) == 0


@pytest.mark.parametrize("quality", ["lossless", "balanced", "max"])
@pytest.mark.parametrize("codec", ["e8", "exact"])
def test_compressed_tensors_against_another_walk(quality: str, codec: str) -> None:
    keys, values = torch.randn(2, 3, 300, 64), torch.randn(2, 3, 300, 32)
    packed = NexusQuantSimple(quality, codec=codec).encode(keys, values)
    assert packed.nbytes == walk(packed.stored) > 0


STATS = CacheStats(
    nbytes=2_000_000,
    elements=8_000_000,
    tokens=1000,
    kept_tokens=412.5,
    layers=4,
    compressed_layers=3,
    exact_layers=1,
)


def test_figures() -> None:
    assert STATS.fp16_nbytes == 16_000_000
    assert STATS.compression_ratio == 8.0
    assert STATS.bits_per_element == 2.0


def test_an_empty_cache_has_no_ratio() -> None:
    empty = CacheStats(0, 0, 0, 0.0, 4, 0, 4)
    assert math.isnan(empty.compression_ratio)
    assert math.isnan(empty.bits_per_element)


def test_one_readable_line() -> None:
    assert str(STATS) == (
        "1.91 MiB for 1000 tokens (412 kept per head), 8.0x smaller than fp16, 2.00 bits/element,"
        " 3 of 4 layers compressed"
    )
