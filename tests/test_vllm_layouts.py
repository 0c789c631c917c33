"""The layout of a block is read off what the backend writes, on fake caches and backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError
from nexusquant.vllm.layouts import Layout, Write, find_layout

BLOCKS, HEADS, TOKENS, DIM = 5, 3, 32, 16


def side_by_side(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """FlashAttention, FlashInfer, Triton."""
    block, offset = slots // TOKENS, slots % TOKENS
    cache[block, :, offset, : keys.shape[-1]] = keys
    cache[block, :, offset, keys.shape[-1] :] = values


def keys_first(transposed: int) -> Write:
    """CPU attention: all keys, `transposed` tokens at a time, then all values."""

    def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            halves = cache[slot // TOKENS].view(HEADS, 2, TOKENS * DIM)
            token = slot % TOKENS
            tiles = halves[:, 0].view(HEADS, TOKENS // transposed, DIM, transposed)
            tiles[:, token // transposed, :, token % transposed] = key
            halves[:, 1].view(HEADS, TOKENS, DIM)[:, token] = value

    return write


def heads_inside(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Heads interleaved with tokens, against what the view says."""
    for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
        block = cache[slot // TOKENS].view(TOKENS, HEADS, 2 * DIM)
        block[slot % TOKENS] = torch.cat([key, value], -1)


def nhd(shape: tuple[int, ...]) -> Tensor:
    """(blocks, tokens, heads, width) in memory."""
    blocks, heads, tokens, width = shape
    return torch.zeros(blocks, tokens, heads, width).transpose(1, 2)


def packed(shape: tuple[int, ...]) -> Tensor:
    """One layer of several in each block."""
    return torch.zeros(shape[0], 4, *shape[1:])[:, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("write", "plain", "make"),
    [
        (side_by_side, True, torch.zeros),
        (side_by_side, True, nhd),
        (side_by_side, True, packed),
        (keys_first(TOKENS), False, torch.zeros),
        (keys_first(16), False, torch.zeros),
        (heads_inside, False, torch.zeros),
    ],
    ids=["hnd", "nhd", "packed", "cpu", "tiles", "interleaved"],
)
def test_what_a_backend_writes_is_read_and_back(
    write: Write, plain: bool, make: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    cache = make((BLOCKS, HEADS, TOKENS, 2 * DIM))
    cache = torch.empty_strided(cache.shape, cache.stride(), dtype=dtype).zero_()
    before = cache.clone()
    layout = find_layout(write, cache, DIM, DIM)
    assert (layout.order is None) is plain
    assert torch.equal(cache, before), "the cache itself is left alone"

    keys, values = torch.randn(2, 2 * TOKENS, HEADS, DIM).to(dtype)
    slots = torch.cat([torch.arange(TOKENS) + 3 * TOKENS, torch.arange(TOKENS) + TOKENS])
    write(keys, values, cache, slots)
    read = layout.read(cache, torch.tensor([3, 1]))
    for given, found in zip((keys, values), read, strict=True):
        assert torch.equal(given.view(2, TOKENS, HEADS, DIM).transpose(1, 2), found)

    other = torch.zeros_like(cache)
    layout.write(other, torch.tensor([3, 1]), *read)
    assert torch.equal(other, cache)


def test_what_was_read_is_a_copy() -> None:
    cache = torch.randn(BLOCKS, HEADS, TOKENS, 2 * DIM)
    layout = Layout((HEADS, TOKENS, DIM), (HEADS, TOKENS, DIM))
    keys, values = layout.read(cache, torch.tensor([0]))
    before = keys.clone(), values.clone()
    cache.zero_()
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_keys_and_values_of_different_dimensions() -> None:
    cache = torch.zeros(BLOCKS, HEADS, TOKENS, 24)
    layout = find_layout(side_by_side, cache, 16, 8)
    assert layout.key_shape == (HEADS, TOKENS, 16)
    assert layout.value_shape == (HEADS, TOKENS, 8)


def rounding(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    side_by_side((keys / 3).round(), values, cache, slots)


def elsewhere(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    side_by_side(keys, values, cache, slots - TOKENS)


def nothing(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    pass


@pytest.mark.parametrize("write", [rounding, elsewhere, nothing])
def test_what_is_no_layout_is_refused(write: Write) -> None:
    with pytest.raises(UnsupportedError, match="attention backend"):
        find_layout(write, torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM), DIM, DIM)


@pytest.mark.parametrize("shape", [(5, 32, 576), (5, 1, 32, 576), (2, 5, 32, 3, 16)])
def test_other_caches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="KV cache of shape"):
        find_layout(side_by_side, torch.zeros(shape), DIM, DIM)
