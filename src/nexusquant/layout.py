"""Row layout: where the code of every 8-dimension group lies in a token's row of bytes.

A row holds one token of every head, head after head, group after group, each group taking as many
bytes as its rate (bits per dimension). Rates differ by head and group; groups of rate 0 are not
stored and heads need not be equally long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nexusquant.errors import ConfigError
from nexusquant.math.e8 import BITS, GROUP, E8Code


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
        """(row_bytes,) int64: which head a byte of the row belongs to."""
        sizes = torch.tensor([sum(head) for head in self.rates], device=device)
        return torch.arange(self.heads, device=device).repeat_interleave(sizes)

    def encode(self, x: Tensor, codes: dict[int, E8Code]) -> Tensor:
        """x (batch, heads, tokens, dim) of unit variance -> (batch, tokens, row_bytes) uint8."""
        batch, _, tokens, _ = x.shape
        groups = x.transpose(1, 2).unflatten(-1, (-1, GROUP)).flatten(2, 3)
        out = torch.empty(batch, tokens, self.row_bytes, dtype=torch.uint8, device=x.device)
        for bits, (members, at) in _by_rate(self, x.device).items():
            out[:, :, at] = codes[bits].encode(groups[:, :, members]).flatten(-2)
        return out

    def decode(self, rows: Tensor, codes: dict[int, E8Code]) -> Tensor:
        """Inverse of `encode`, (batch, heads, tokens, dim) fp32; groups of rate 0 become zeros."""
        count = self.heads * self.groups
        out = rows.new_zeros(*rows.shape[:-1], count, GROUP, dtype=torch.float32)
        for bits, (members, at) in _by_rate(self, rows.device).items():
            out[:, :, members] = codes[bits].decode(rows[:, :, at].unflatten(-1, (-1, bits)))
        return out.view(*rows.shape[:-1], self.heads, self.groups * GROUP).transpose(1, 2)


@lru_cache(maxsize=4096)  # side x tier x layer x subset of heads
def _by_rate(layout: RowLayout, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Rate to its members (indices into heads x groups) and their bytes in the row."""
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
