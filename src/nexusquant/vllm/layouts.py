"""Where an attention backend keeps keys and values in a block of its paged cache.

vLLM gives connectors every layer's cache as a view (blocks, heads, tokens, width), whatever the
order in memory (NHD or HND), but the inside of a block is the backend's: FlashAttention, FlashInfer
and Triton keep `[key, value]` of a token side by side, CPU attention has all keys and then all
values, the keys transposed or in tiles, by the instruction set it found. So the inside is not
assumed but read off: numbered keys and values are written into a scratch block with the backend's
own function, and where the numbers turn up is the layout. What is no permutation is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError

_BASE = 128  # digits up to 127 are exact in every floating point type

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(keys, values, cache, slots): keys, values (tokens, heads, dim) into slots of a cache."""


@dataclass(frozen=True)
class Layout:
    """The inside of a block.

    Attributes:
        key_shape, value_shape: (heads, tokens, dim).
        order: (elements,) int64: the place in a block, seen as (heads, tokens, width), of each
            element of its keys and then of its values; None if every token has key and value side
            by side.
    """

    key_shape: tuple[int, int, int]
    value_shape: tuple[int, int, int]
    order: Tensor | None = None

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks, each (blocks, heads, tokens, dim), as copies.

        Args:
            cache: (blocks, heads, tokens, width) of any strides.
            blocks: int64, which ones.
        """
        pages = cache.index_select(0, blocks)
        if self.order is None:
            keys, values = pages.split([self.key_shape[2], self.value_shape[2]], dim=-1)
        else:
            flat = pages.flatten(1).index_select(1, self.order)
            keys, values = flat.split([prod(self.key_shape), prod(self.value_shape)], dim=1)
        return keys.reshape(-1, *self.key_shape), values.reshape(-1, *self.value_shape)

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, each (blocks, heads, tokens, dim), into some blocks of a cache."""
        if self.order is None:
            pages = torch.cat([keys, values], dim=-1)
        else:
            pages = keys.new_empty(len(blocks), len(self.order))
            pages[:, self.order] = torch.cat([keys.flatten(1), values.flatten(1)], dim=1)
        cache.index_copy_(0, blocks, pages.view(-1, *cache.shape[1:]))


def find_layout(write: Write, cache: Tensor, head_dim: int, value_dim: int) -> Layout:
    """The layout that a backend writes.

    Args:
        write: the backend's own function.
        cache: (blocks, heads, tokens, width) of one layer; it is not touched.

    Raises:
        UnsupportedError: width is not that of a key and a value, or what was written does not turn
            up, each element once and in its block.
    """
    if cache.ndim != 4 or cache.shape[-1] != head_dim + value_dim:
        raise UnsupportedError(
            f"a KV cache of shape {tuple(cache.shape)} where (blocks, heads, tokens,"
            f" {head_dim + value_dim}) was expected: this attention backend is not supported."
        )
    heads, tokens = cache.shape[1], cache.shape[2]
    shapes = (heads, tokens, head_dim), (heads, tokens, value_dim)
    count = heads * tokens * (head_dim + value_dim)
    numbers = torch.arange(count, device=cache.device)
    slots = torch.arange(tokens, 2 * tokens, device=cache.device)  # the second block
    found = torch.zeros(count, dtype=torch.int64, device=cache.device)
    place = 1
    while place < count:
        digits = (numbers // place % _BASE).to(cache.dtype)
        keys, values = (
            part.view(shape).transpose(0, 1).contiguous()
            for part, shape in zip(digits.split([prod(s) for s in shapes]), shapes, strict=True)
        )
        scratch = torch.empty_strided(
            (2, *cache.shape[1:]), cache.stride(), dtype=cache.dtype, device=cache.device
        ).zero_()
        write(keys, values, scratch, slots)
        if scratch[0].any():
            raise UnsupportedError("the attention backend writes outside of a token's block.")
        found += scratch[1].reshape(-1).long() * place
        place *= _BASE
    order = torch.argsort(found)
    if not torch.equal(found[order], numbers):
        raise UnsupportedError(
            "the attention backend does not keep keys and values as they are, each element once"
            " per block: its KV cache cannot be stored."
        )
    layout = Layout(*shapes)
    places = numbers.view(1, *cache.shape[1:])
    plain = torch.cat([x.flatten() for x in layout.read(places, numbers[:1])])
    return layout if torch.equal(order, plain) else Layout(*shapes, order)
