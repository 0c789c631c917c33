"""Which tokens a press has left, from nothing but the keys and values that it left."""

from __future__ import annotations

import torch
from torch import Tensor

from nexusquant.errors import UnsupportedError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def chosen(
    keys: Tensor, values: Tensor, left_keys: Tensor, left_values: Tensor, layer: int
) -> Tensor:
    """Which of `keys` and `values` (batch, kv_heads, tokens, dim) are left.

    Returns:
        (batch, kv_heads, tokens) bool; of identical tokens the first ones.

    Raises:
        UnsupportedError: something is left that was not there.
    """
    batch, heads, tokens, _ = keys.shape
    fits = left_keys.shape[:3] == left_values.shape[:3] and left_keys.shape[:2] == (batch, heads)
    same = all(
        x.shape[-1] == y.shape[-1] and x.dtype == y.dtype
        for x, y in ((keys, left_keys), (values, left_values))
    )
    if fits and same and left_keys.shape[2] <= tokens:
        whole, order = _hashes(keys, values).sort(dim=-1)
        left, back = _hashes(left_keys, left_values).sort(dim=-1)
        # The n-th of equal rows that are left is the n-th of the equal rows there were.
        rank = torch.arange(left.shape[-1], device=left.device) - torch.searchsorted(left, left)
        at = (torch.searchsorted(whole, left) + rank).clamp(max=tokens - 1)
        index = torch.empty_like(back).scatter_(-1, back, order.gather(-1, at))
        found = (index[..., None].expand(-1, -1, -1, x.shape[-1]) for x in (keys, values))
        if all(
            torch.equal(x.gather(2, i), y)
            for x, y, i in zip((keys, values), (left_keys, left_values), found, strict=True)
        ):
            return torch.zeros_like(keys[..., 0], dtype=torch.bool).scatter_(-1, index, True)
    raise UnsupportedError(
        f"a press left keys {tuple(left_keys.shape)} and values {tuple(left_values.shape)} in layer"
        f" {layer} that are not a choice of its tokens {tuple(keys.shape)}: presses that change"
        " keys or values cannot be combined with codes."
    )


def _hashes(keys: Tensor, values: Tensor) -> Tensor:
    """(batch, kv_heads, tokens) int64 of all bits of every token."""
    total = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    for seed, x in enumerate((keys, values)):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randint(2**62, (x.shape[-1],), generator=generator).to(x.device)
        bits = x.contiguous().view(_BITS[x.dtype.itemsize])
        total += (bits.long() * (2 * factors + 1)).sum(-1)  # integers wrap around
    return total
