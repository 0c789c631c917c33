"""Row layout: where the code of every 8-dimension group lies among the bytes of a token.

A token takes one byte in each of `row_bytes` rows: head after head, group after group, each group
taking as many rows as its rate (bits per dimension). Neighbours in a row are neighbouring tokens,
so that vector units and coalesced loads read many tokens at once. Rates differ by head and group;
groups of rate 0 are not stored and heads need not take equally many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nexusquant.errors import ConfigError
from nexusquant.math.e8 import BITS, GROUP, Book


@dataclass(frozen=True)
class RowLayout:
    """Rates of one layer's keys or values, `rates[head][group]` in bits per dimension.

    Raises:
        ConfigError: no heads, ragged rates, or a rate without a code.
    """

    rates: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.rates or len({len(head) for head in self.rates}) != 1:
            raise ConfigError(f"rates need one equally long tuple per head, got {self.rates}.")
        wrong = {bits for head in self.rates for bits in head if bits and bits not in BITS}
        if wrong:
            raise ConfigError(f"rates {sorted(wrong)}: each must be 0 or one of {BITS}.")

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.rates)

    @property
    def groups(self) -> int:
        """Groups of 8 dimensions per head."""
        return len(self.rates[0])

    @property
    def row_bytes(self) -> int:
        """Bytes per token, all heads together."""
        return sum(map(sum, self.rates))

    def of_heads(self, heads: tuple[int, ...]) -> RowLayout:
        """Rows that hold only some of the heads."""
        return RowLayout(tuple(self.rates[head] for head in heads))

    def stored(self, device: torch.device) -> Tensor:
        """(heads, groups) bool: rates above 0."""
        return torch.tensor(self.rates, device=device) > 0

    def head_of_byte(self, device: torch.device) -> Tensor:
        """(row_bytes,) int64: which head a row belongs to."""
        sizes = torch.tensor([sum(head) for head in self.rates], device=device)
        return torch.arange(self.heads, device=device).repeat_interleave(sizes)

    def encode(self, x: Tensor, codes: Book) -> Tensor:
        """x (batch, heads, tokens, dim) of unit variance -> (batch, row_bytes, tokens) uint8."""
        batch, _, tokens, _ = x.shape
        groups = x.unflatten(-1, (-1, GROUP)).transpose(2, 3).flatten(1, 2)  # (b, h g, tokens, 8)
        out = torch.empty(batch, self.row_bytes, tokens, dtype=torch.uint8, device=x.device)
        for bits, (members, at) in _by_rate(self, x.device).items():
            out[:, at] = codes[bits].encode(groups[:, members]).mT.flatten(1, 2)
        return out

    def decode(self, rows: Tensor, codes: Book) -> Tensor:
        """Inverse of `encode`, (batch, heads, tokens, dim) fp32; groups of rate 0 become zeros."""
        batch, _, tokens = rows.shape
        count = self.heads * self.groups
        out = rows.new_zeros(batch, count, tokens, GROUP, dtype=torch.float32)
        for bits, (members, at) in _by_rate(self, rows.device).items():
            out[:, members] = codes[bits].decode(rows[:, at].unflatten(1, (-1, bits)).mT)
        return out.unflatten(1, (self.heads, -1)).transpose(2, 3).flatten(3)


@lru_cache(maxsize=4096)  # side x tier x layer x subset of heads
def _by_rate(layout: RowLayout, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Rate to its members (indices into heads x groups) and their rows."""
    flat = [bits for head in layout.rates for bits in head]
    found: dict[int, tuple[list[int], list[int]]] = {}
    byte = 0
    for index, bits in enumerate(flat):
        members, at = found.setdefault(bits, ([], []))
        members.append(index)
        at.extend(range(byte, byte + bits))
        byte += bits
    found.pop(0, None)
    return {
        bits: (torch.tensor(members, device=device), torch.tensor(at, device=device))
        for bits, (members, at) in sorted(found.items())
    }
