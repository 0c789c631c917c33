"""Row layout: where the code of every 8-dimension group lies in a token's row of bytes.

Each head has a rate (bits per dimension, 0 = not stored) per group, not increasing from group to
group: transforms order their dimensions by variance, and uniform rates are the special case. Groups
follow each other, each taking as many bytes as its rate. All heads of a layer share the row length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.errors import ConfigError
from nexusquant.math.e8 import BITS, GROUP, E8Code


@dataclass(frozen=True)
class Run:
    """Consecutive groups of one rate: groups [group, group_stop) in bytes [byte, byte_stop)."""

    bits: int
    group: int
    group_stop: int
    byte: int
    byte_stop: int


@dataclass(frozen=True)
class RowLayout:
    """Rates of one layer's keys or values, `rates[head][group]` in bits per dimension.

    Raises:
        ConfigError: no heads, ragged rates, a rate without a code, or rates that increase.
    """

    rates: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.rates or len({len(head) for head in self.rates}) != 1:
            raise ConfigError(f"rates need one equally long tuple per head, got {self.rates}.")
        for head in self.rates:
            if any(b and b not in BITS for b in head) or list(head) != sorted(head, reverse=True):
                raise ConfigError(
                    f"rates {head}: each must be 0 or one of {BITS}, not increasing by group."
                )

    @property
    def row_bytes(self) -> int:
        """Bytes per token and head, set by the head with the most bits."""
        return max(sum(head) for head in self.rates)

    def runs(self, head: int) -> list[Run]:
        """The runs of equal nonzero rate of one head."""
        rates, out, byte = self.rates[head], [], 0
        for bits in sorted(set(rates) - {0}, reverse=True):
            group, count = rates.index(bits), rates.count(bits)
            out.append(Run(bits, group, group + count, byte, byte + count * bits))
            byte += count * bits
        return out

    def head_sets(self) -> list[tuple[slice | list[int], list[Run]]]:
        """Heads that share their rates, with their runs: one entry when all heads are alike."""
        if len(set(self.rates)) == 1:
            return [(slice(None), self.runs(0))]
        sets: dict[tuple[int, ...], list[int]] = {}
        for head, rates in enumerate(self.rates):
            sets.setdefault(rates, []).append(head)
        return [(heads, self.runs(heads[0])) for heads in sets.values()]

    def encode(self, x: Tensor, codes: dict[int, E8Code]) -> Tensor:
        """x (batch, heads, tokens, dim) of unit variance -> (batch, heads, tokens, row_bytes)."""
        groups = x.unflatten(-1, (-1, GROUP))
        out = torch.zeros(*x.shape[:-1], self.row_bytes, dtype=torch.uint8, device=x.device)
        for heads, runs in self.head_sets():
            for run in runs:
                part = codes[run.bits].encode(groups[:, heads, :, run.group : run.group_stop])
                out[:, heads, :, run.byte : run.byte_stop] = part.flatten(-2)
        return out

    def decode(self, data: Tensor, codes: dict[int, E8Code]) -> Tensor:
        """Inverse of `encode`; groups of rate 0 become zeros."""
        dim = len(self.rates[0]) * GROUP
        whole = len(self.head_sets()) == 1 and len(self.runs(0)) == 1
        if whole and 0 not in self.rates[0]:
            bits = self.rates[0][0]
            return codes[bits].decode(data.unflatten(-1, (-1, bits))).flatten(-2)
        out = torch.zeros(*data.shape[:-1], dim, dtype=torch.float32, device=data.device)
        for heads, runs in self.head_sets():
            for run in runs:
                part = data[:, heads, :, run.byte : run.byte_stop].unflatten(-1, (-1, run.bits))
                values = codes[run.bits].decode(part).flatten(-2)
                out[:, heads, :, run.group * GROUP : run.group_stop * GROUP] = values
        return out
