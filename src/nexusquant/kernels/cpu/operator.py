"""The operator of CPUs: Numba kernels, 16 tokens at a time."""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nexusquant.kernels.base import Coded, Entry, Partial, Request, exact, is_coded
from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu import attend
from nexusquant.kernels.cpu.arguments import Call, Coding, Side
from nexusquant.kernels.cpu.compiled import Task
from nexusquant.kernels.cpu.describe import (
    DTYPES,
    NOWHERE,
    address,
    bias,
    describe_coded,
    describe_exact,
    row_stride,
    side,
)
from nexusquant.kernels.cpu.encode import RUN, decode, encode
from nexusquant.kernels.cpu.run import run
from nexusquant.kernels.cpu.simd import LANES
from nexusquant.kernels.cpu.tables import (
    code_tables,
    coded_width,
    gain_table,
    lookups,
)
from nexusquant.kernels.plans import Plans, one_space
from nexusquant.kernels.reference import Reference, too_large
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import Book
from nexusquant.math.gains import LIMIT
from nexusquant.pages import Pages, pages_of

_MAX_DIM = 512


class Numba(Reference):
    """See `nexusquant.kernels.base.Operator`; what the kernels do not take goes to the reference,
    which decodes with them."""

    name = "numba"

    def encode(
        self, x: Tensor, layout: RowLayout, book: Book, entry: Entry | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and gains of x (batch, heads, tokens, dim)."""
        y = x if entry is None else entry.enter(x)
        batch, heads, tokens, _ = y.shape
        columns = y.mT.float().contiguous()
        rows = torch.empty(batch, layout.row_bytes, tokens, dtype=torch.uint8)
        gains = torch.empty(batch, heads, tokens, dtype=torch.uint8)
        bad = _code(encode, layout, book, columns, rows, gains)
        if bad:
            raise too_large(bad, gains.numel())
        return rows, gains

    def decode(self, rows: Tensor, gains: Tensor, layout: RowLayout, book: Book) -> Tensor:
        """Vectors in code space, (batch, heads, tokens, dim) fp32."""
        rows, gains = (x if x.stride(2) == 1 else x.contiguous() for x in (rows, gains))
        y = torch.zeros(*gains.shape[:2], 8 * layout.groups, gains.shape[2])
        _code(decode, layout, book, y, rows, gains)
        return y.mT

    def decode_attention(self, request: Request) -> Partial:
        """Attention to all parts at once, if they are few queries."""
        done = _attend(request)
        return super().decode_attention(request) if done is None else done


def _code(
    kernel: Task, layout: RowLayout, book: Book, y: Tensor, rows: Tensor, gains: Tensor
) -> int:
    """Encode or decode y (batch, heads, dim, tokens). Returns how many vectors have no gain."""
    batch, heads, dim, tokens = y.shape
    tables, runs = lookups(layout, book), -(-tokens // RUN)
    tasks = batch * heads * runs
    bad = array("i", bytes(4 * tasks))
    call = Coding(
        tables.codes, tables.gains, _LIMIT, tables.groups, layout.groups + 1, heads, dim,
        tokens, runs, y.data_ptr(), rows.data_ptr(), rows.stride(0), rows.stride(1),
        gains.data_ptr(), gains.stride(0), gains.stride(1), bad.buffer_info()[0],
    )  # fmt: skip
    _run(call, (kernel, tasks))
    return sum(bad)


def _run(arguments: Iterable[int], *kernels: tuple[Task, int]) -> None:
    """Kernels one after another, each with the number of its tasks."""
    held = array("q", arguments)
    address = held.buffer_info()[0]
    steps = array("q")
    for kernel, tasks in kernels:
        steps.extend((kernel.address, address, tasks))
    with _threads():
        run(steps.buffer_info()[0], len(kernels))


def _bits(x: float) -> int:
    """Of a float32."""
    return int.from_bytes(struct.pack("=f", x), sys.byteorder, signed=True)


_LIMIT = _bits(LIMIT)


@dataclass(frozen=True)
class _Plan:
    """What stays the same from step to step while nothing is appended.

    Attributes:
        table: one line per part, for the kernel.
        spaces: code spaces of keys and values.
        width: coordinates of queries in code space.
        entries: of all parts together.
        keep: what the addresses in it point at.
    """

    table: np.ndarray
    spaces: tuple[Side, Side]
    width: int
    entries: int
    keep: list[Any]


_plans: Plans[_Plan | None] = Plans()


def _plan(coded: Sequence[Coded], batch: int, kv_heads: int) -> _Plan | None:
    """For these parts; None if they are not in one code space."""
    if not one_space(coded):
        return None
    keep: list[Any] = []
    width = max((coded_width(part.layouts[0]) for part in coded), default=LANES)
    table = np.zeros((len(coded), at.FIELDS), np.int64)
    entries = 0
    for row, part in zip(table, coded, strict=True):
        row[at.ENTRY] = entries
        entries += part.slots.count
        describe_coded(part, kv_heads, row, keep)
    spaces = (NOWHERE, NOWHERE)
    if coded:
        keys, values = coded[0].spaces
        spaces = side(keys, batch, kv_heads, width, keep), side(values, batch, kv_heads, 0, keep)
    return _Plan(table, spaces, width, entries, keep)


def _attend(request: Request) -> Partial | None:
    """By the kernel; None for what it does not take."""
    coded = [part for part in request.parts if is_coded(part)]
    uncoded = [exact(part) for part in request.parts if not is_coded(part)]
    batch, heads, q_len, dim = request.query.shape
    kv_heads = request.kv_heads
    rows = heads // kv_heads * q_len
    held = attend.filled(rows)
    if held is None or dim > _MAX_DIM:
        return None
    if any(x.dtype not in DTYPES for part in uncoded for x in (part.keys, part.values)):
        return None
    slots = max((part.slots.stop for part in coded), default=1)
    pages = pages_of(request.frame, slots, dim, request.query.device)
    plan = _plans.of(coded, partial(_plan, coded, batch, kv_heads))
    if pages is None or plan is None or pages.slots < slots:
        return None
    keep: list[Any] = []  # alive until the kernel returns
    query = (request.query.float() * request.scaling).reshape(batch, kv_heads, rows, dim)
    query = pad(query, (0, 0, 0, held - rows)) if held > rows else query.contiguous()
    sinks = None if request.sink_logits is None else request.sink_logits.float().contiguous()
    table = np.zeros((len(uncoded), at.FIELDS), np.int64)
    for row, some in zip(table, uncoded, strict=True):
        describe_exact(some, kv_heads, row, keep)
    dim_v = 8 * coded[0].layouts[1].groups if coded else uncoded[0].values.shape[-1]
    call = Call(
        batch, kv_heads, rows, q_len, dim, dim_v, query.data_ptr(), pages.count,
        pages.turns.shape[2], pages.turns.shape[1] // 2, pages.turns.data_ptr(),
        row_stride(pages.turns), pages.page_of.data_ptr(), row_stride(pages.page_of),
        pages.rotary.data_ptr(), plan.width,
        _splits(pages, batch * kv_heads), 0 if sinks is None else sinks.data_ptr(), plan.entries,
        address(code_tables(coded[0].book), keep) if coded else 0, gain_table().ctypes.data,
        _bits(request.softcap or 0),
    )  # fmt: skip
    output, lse = (torch.empty(batch, kv_heads, held, n) for n in (dim_v, 1))
    tasks = batch * kv_heads
    middle = [(attend.splits[held], tasks * call.splits)] if coded else []
    _run(
        (*call, *bias(request, q_len, kv_heads, keep), *plan.spaces[0], *plan.spaces[1],
         *_work(call, held, plan.table, table, keep), held, output.data_ptr(), lse.data_ptr()),
        (attend.prepare, tasks), *middle, (attend.merge, tasks),
    )  # fmt: skip
    del keep
    return Partial(*(x[:, :, :rows].unflatten(2, (-1, q_len)) for x in (output, lse)))


def _work(
    call: Call, held: int, coded: np.ndarray, uncoded: np.ndarray, keep: list[Any]
) -> tuple[int, ...]:
    """Tables, and memory for what kernels keep for each other: `Work` up to `sent`."""
    heads, kinds, splits = call.batch * call.kv_heads, 2 * call.columns + 1, call.splits + 1
    sizes = [
        heads * n
        for n in (call.entries, kinds * held * call.width, kinds * held, splits * held,
                  splits * held, splits * held * call.dim_v)
    ]  # fmt: skip
    memory = torch.empty(sum(sizes))
    keep += [coded, uncoded, memory]
    start = memory.data_ptr()
    places = [start + 4 * n for n in accumulate(sizes[:-1], initial=0)]
    return coded.ctypes.data, len(coded), uncoded.ctypes.data, len(uncoded), *places


_turn = threading.Lock()


def _threads() -> AbstractContextManager[object]:
    """As many as PyTorch uses; one caller at a time where Numba's threads take only one."""
    wanted = torch.get_num_threads()
    # Both ignores: Numba has no stubs, so mypy reads its sources. There, settings are assigned
    # through globals(), and threading_layer, though documented, is missing in __all__.
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(wanted, most))
    if torch.get_num_threads() != wanted:  # starting its threads, Numba tells OpenMP how many
        torch.set_num_threads(wanted)
    layer = numba.threading_layer()  # type: ignore[attr-defined]
    return _turn if layer == "workqueue" else nullcontext()


def _splits(pages: Pages, heads: int) -> int:
    """Parts of the context, so that all threads have work."""
    return max(1, min(pages.count // 32, -(-4 * torch.get_num_threads() // heads)))
