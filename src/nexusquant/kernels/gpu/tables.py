"""What the Triton kernels look up: coefficients, chunks of equal rate, parts and work."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from nexusquant.kernels.gpu.encode import COSET, EDGES, LEVELS, LINE, LOWEST, PRICE, REACH
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, DISTORTION, GROUP, Book, polynomial, split_bits
from nexusquant.math.gains import GAINS, decode_gain


@lru_cache(maxsize=16)
def coefficients(book: Book, device: torch.device) -> Tensor:
    """(9, 4) fp32, of the levels of every rate (`math.e8.polynomial`)."""
    out = torch.zeros(len(BITS) + 1, 4)
    for bits in BITS:
        code = book[bits]
        out[bits] = torch.tensor(polynomial(bits, code.kind, code.widen))
    return out.to(device)


@lru_cache(maxsize=16)
def level_table(book: Book, device: torch.device) -> Tensor:
    """(9, LINE) fp32, see `encode.LINE`."""
    out = torch.zeros(len(BITS) + 1, LINE.value)
    for bits in BITS:
        levels, line = book[bits].levels(), out[bits]
        line[REACH.value], line[PRICE.value] = levels[-1], 1 / DISTORTION[bits]
        low, _ = split_bits(bits)
        lowest = torch.tensor([sum(1 << (low * i) for i in range(GROUP))], dtype=torch.int32)
        line[LOWEST.value] = lowest.view(torch.float32)[0]
        line[LEVELS.value : LEVELS.value + len(levels)] = levels
        for coset in (0, 1):
            own, start = levels[coset::2], EDGES.value + COSET.value * coset
            line[start : start + len(own) - 1] = (own[1:] + own[:-1]) / 2
    return out.to(device)


@lru_cache(maxsize=8192)
def rates_and_rows(layout: RowLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every group its rate and its first row, (heads, groups) int32."""
    rates = torch.tensor(layout.rates, dtype=torch.int32)
    last = rates.flatten().cumsum(0).view(rates.shape).int()
    return rates.to(device), (last - rates).to(device)


@lru_cache(maxsize=4)
def gain_values(device: torch.device) -> Tensor:
    """(16,) fp32."""
    return decode_gain(torch.arange(GAINS, dtype=torch.uint8)).to(device)


@lru_cache(maxsize=8192)
def chunks(layout: RowLayout) -> list[list[tuple[int, ...]]]:
    """Per head: pairs of groups of equal rate, see `attend.CHUNK`."""
    out, row = [], 0
    for rates in layout.rates:
        by_rate: dict[int, list[tuple[int, int]]] = {}
        for group, bits in enumerate(rates):
            if bits:
                by_rate.setdefault(bits, []).append((row, group))
                row += bits
        head: list[tuple[int, ...]] = []
        for bits, members in sorted(by_rate.items()):
            for (row_0, group_0), (row_1, group_1) in itertools.zip_longest(
                members[::2], members[1::2], fillvalue=(-1, -1)
            ):
                head.append((bits, row_0, row_1, group_0, group_1))
        out.append(head)
    return out


@lru_cache(maxsize=8192)
def chunk_table(layout: RowLayout, width: int, device: torch.device) -> Tensor:
    """(heads, width, 5) int32, see `attend.CHUNK`; zeros behind a head's last one."""
    out = torch.zeros(layout.heads, width, 5, dtype=torch.int32)
    for table, head in zip(out, chunks(layout), strict=True):
        for row, chunk in zip(table, head, strict=False):
            row.copy_(torch.tensor(chunk))
    return out.to(device)


def chunk_count(layout: RowLayout) -> int:
    """Chunks of the head that has most."""
    return max(map(len, chunks(layout)))


@lru_cache(maxsize=8192)
def stored_groups(layout: RowLayout, device: torch.device) -> Tensor:
    """(heads,) int64, bit g for group g."""
    bits = [sum(1 << g for g, rate in enumerate(head) if rate) for head in layout.rates]
    return torch.tensor([b - (1 << 64) if b >> 63 else b for b in bits], device=device)


@lru_cache(maxsize=1024)
def head_map(heads: tuple[int, ...] | None, kv_heads: int, device: torch.device) -> Tensor:
    """(kv_heads,) int32: which head of a part it is, -1 if none."""
    out = torch.arange(kv_heads, dtype=torch.int32)
    if heads is not None:
        out[:] = -1
        out[list(heads)] = torch.arange(len(heads), dtype=torch.int32)
    return out.to(device)
