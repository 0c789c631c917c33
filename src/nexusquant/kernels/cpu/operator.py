"""The operator of CPUs: Numba kernels, 16 tokens at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nexusquant.kernels.base import Coded, Entry, Exact, Partial, Request, Space, exact, is_coded
from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu import attend, encode
from nexusquant.kernels.cpu.arguments import Bias, Call, Side
from nexusquant.kernels.cpu.simd import LANES
from nexusquant.kernels.cpu.tables import (
    code_tables,
    coded_width,
    gain_table,
    group_table,
    head_map,
)
from nexusquant.kernels.plans import Plans, one_space
from nexusquant.kernels.reference import Reference, too_large
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import Book
from nexusquant.math.gains import LIMIT
from nexusquant.pages import Pages, pages_of
from nexusquant.slots import Slots

ROWS = (1, 2, 3, 4, 8, 16)
"""Queries per KV head, times their number, that the attention kernel is compiled for; others are
filled up. More are better served by decoding blocks once and multiplying matrices."""
_MAX_DIM = 512
_DTYPES = {torch.float32: at.FP32, torch.float16: at.FP16, torch.bfloat16: at.BF16}
_KINDS = {torch.uint8: at.GAPS_8, torch.int16: at.GAPS_16, torch.int32: at.GAPS_32}
_NOWHERE = Side(0, 1, 0, 0, 0, 0, 0, 0, 0)


class Numba(Reference):
    """See `nexusquant.kernels.base.Operator`; what the kernels do not take goes to the reference,
    which decodes with them."""

    name = "numba"

    def encode(
        self, x: Tensor, layout: RowLayout, book: Book, entry: Entry | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and gains of x (batch, heads, tokens, dim)."""
        y = x if entry is None else entry.enter(x)
        batch, heads, tokens, dim = y.shape
        columns = y.mT.float().contiguous()
        codes, groups = code_tables(book), group_table(layout)
        rows = torch.empty(batch, layout.row_bytes, tokens, dtype=torch.uint8)
        gains = torch.empty(batch, heads, tokens, dtype=torch.uint8)
        with _threads():
            bad = encode.encode(
                codes.ctypes.data, gain_table().ctypes.data, np.float32(LIMIT), groups.ctypes.data,
                layout.groups + 1, batch, heads, dim, tokens, columns.data_ptr(), rows.data_ptr(),
                gains.data_ptr(),
            )  # fmt: skip
        if bad:
            raise too_large(bad, gains.numel())
        return rows, gains

    def decode(self, rows: Tensor, gains: Tensor, layout: RowLayout, book: Book) -> Tensor:
        """Vectors in code space, (batch, heads, tokens, dim) fp32."""
        rows, gains = (x if x.stride(2) == 1 else x.contiguous() for x in (rows, gains))
        batch, heads, tokens = gains.shape
        codes, groups = code_tables(book), group_table(layout)
        y = torch.zeros(batch, heads, 8 * layout.groups, tokens)
        with _threads():
            encode.decode(
                codes.ctypes.data, gain_table().ctypes.data, groups.ctypes.data, layout.groups + 1,
                batch, heads, y.shape[2], tokens, (rows.data_ptr(), *rows.stride()[:2]),
                (gains.data_ptr(), *gains.stride()[:2]), y.data_ptr(),
            )  # fmt: skip
        return y.mT

    def decode_attention(self, request: Request) -> Partial:
        """Attention to all parts at once, if they are few queries."""
        done = _attend(request)
        return super().decode_attention(request) if done is None else done


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
        _describe(part, kv_heads, row, keep)
    spaces = (_NOWHERE, _NOWHERE)
    if coded:
        keys, values = coded[0].spaces
        spaces = _side(keys, batch, kv_heads, width, keep), _side(values, batch, kv_heads, 0, keep)
    return _Plan(table, spaces, width, entries, keep)


def _attend(request: Request) -> Partial | None:
    """By the kernel; None for what it does not take."""
    coded = [part for part in request.parts if is_coded(part)]
    uncoded = [exact(part) for part in request.parts if not is_coded(part)]
    batch, heads, q_len, dim = request.query.shape
    kv_heads = request.kv_heads
    rows = heads // kv_heads * q_len
    if rows > ROWS[-1] or dim > _MAX_DIM:
        return None
    if any(x.dtype not in _DTYPES for part in uncoded for x in (part.keys, part.values)):
        return None
    slots = max((part.slots.stop for part in coded), default=1)
    pages = pages_of(request.frame, slots, dim, request.query.device)
    plan = _plans.of(coded, partial(_plan, coded, batch, kv_heads))
    if pages is None or plan is None or pages.slots < slots:
        return None
    keep: list[Any] = []  # alive until the kernel returns
    held = next(n for n in ROWS if n >= rows)
    query = (request.query.float() * request.scaling).reshape(batch, kv_heads, rows, dim)
    query = pad(query, (0, 0, 0, held - rows)) if held > rows else query.contiguous()
    sinks = None if request.sink_logits is None else request.sink_logits.float().contiguous()
    table = np.zeros((len(uncoded), at.FIELDS), np.int64)
    for row, some in zip(table, uncoded, strict=True):
        _describe_exact(some, kv_heads, row, keep)
    dim_v = 8 * coded[0].layouts[1].groups if coded else uncoded[0].values.shape[-1]
    call = Call(
        batch, kv_heads, rows, q_len, dim, dim_v, query.data_ptr(), pages.count,
        pages.turns.shape[2], pages.turns.shape[1] // 2, pages.turns.data_ptr(), _row(pages.turns),
        pages.page_of.data_ptr(), _row(pages.page_of), pages.rotary.data_ptr(), plan.width,
        _splits(pages, batch * kv_heads), 0 if sinks is None else sinks.data_ptr(), plan.entries,
        _address(code_tables(coded[0].book), keep) if coded else 0, gain_table().ctypes.data,
        np.float32(request.softcap or 0),
    )  # fmt: skip
    output, lse = (torch.empty(batch, kv_heads, held, n) for n in (dim_v, 1))
    with _threads():
        attend.attend(
            (0,) * held, call, _bias(request, q_len, kv_heads, keep), *plan.spaces, plan.table,
            table, output.data_ptr(), lse.data_ptr(),
        )  # fmt: skip
    del keep
    return Partial(*(x[:, :, :rows].unflatten(2, (-1, q_len)) for x in (output, lse)))


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


def _row(x: Tensor) -> int:
    """Elements from one batch row to the next, 0 if all share one."""
    return 0 if len(x) == 1 else x.stride(0)


def _contiguous(x: Tensor, keep: list[Any]) -> int:
    """Address of x, or of a copy that is contiguous."""
    whole = x.contiguous()
    keep.append(whole)
    return whole.data_ptr()


def _address(x: np.ndarray, keep: list[Any]) -> int:
    keep.append(x)
    return x.ctypes.data


def _slots(slots: Slots, row: np.ndarray, keep: list[Any]) -> None:
    stored = slots.stored
    row[at.TOKENS], row[at.SLOT_KIND], row[at.SLOT_START] = slots.count, at.CONTIGUOUS, slots.start
    if stored is not None:
        row[at.SLOT_KIND] = at.BITMAP if slots.bitmap is not None else _KINDS[stored.dtype]
        row[at.SLOT_DATA], row[at.SLOT_BYTES] = _contiguous(stored, keep), stored.shape[2]
        row[at.SLOT_HEAD] = 0 if stored.shape[1] == 1 else stored.shape[2]
        row[at.SLOT_BATCH] = 0 if stored.shape[0] == 1 else stored.shape[1] * stored.shape[2]


def _describe(part: Coded, kv_heads: int, row: np.ndarray, keep: list[Any]) -> None:
    """A line about a coded part."""
    keys, values = part.layouts
    row[at.KEY_ROWS], row[at.VALUE_ROWS], row[at.GAINS] = (
        _contiguous(x, keep) for x in (part.key_rows, part.value_rows, part.gains)
    )
    row[at.KEY_GROUPS], row[at.KEY_WIDTH] = _address(group_table(keys), keep), keys.groups + 1
    row[at.VALUE_GROUPS] = _address(group_table(values), keep)
    row[at.VALUE_WIDTH], row[at.HEADS] = values.groups + 1, keys.heads
    row[at.KEY_BYTES], row[at.VALUE_BYTES] = keys.row_bytes, values.row_bytes
    row[at.HEAD_MAP] = _address(head_map(part.heads, kv_heads), keep)
    _slots(part.slots, row, keep)


def _describe_exact(part: Exact, kv_heads: int, row: np.ndarray, keep: list[Any]) -> None:
    """A line about an uncoded part."""
    # One of the two may have been kept wider, as it would have overflowed.
    wide = torch.promote_types(part.keys.dtype, part.values.dtype)
    keys, values = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (part.keys.to(wide), part.values.to(wide))
    )
    keep += [keys, values]
    row[at.KEYS : at.KEY_TOKEN + 1] = keys.data_ptr(), *keys.stride()[:3]
    row[at.VALUES : at.VALUE_TOKEN + 1] = values.data_ptr(), *values.stride()[:3]
    row[at.DTYPE] = _DTYPES[keys.dtype]
    row[at.HEAD_MAP] = _address(head_map(part.heads, kv_heads), keep)
    _slots(part.slots, row, keep)


def _side(space: Space, batch: int, kv_heads: int, width: int, keep: list[Any]) -> Side:
    """A code space, with at least `width` columns."""
    inverse = space.inverse
    if inverse.shape[2] < width:
        inverse = pad(inverse, (0, width - inverse.shape[2]))
    per_dim = space.mean if space.mean.shape[-1] > 1 else None  # a single number is zero
    return Side(
        _contiguous(inverse, keep), len(inverse), inverse.shape[2],
        *_centre(space.scale, batch, kv_heads, keep), *_centre(per_dim, batch, kv_heads, keep),
    )  # fmt: skip


def _centre(x: Tensor | None, batch: int, kv_heads: int, keep: list[Any]) -> tuple[int, int, int]:
    """Address, row length and dtype of x (batch or 1, heads or 1, 1, n)."""
    if x is None:
        return 0, 0, 0
    if x.dtype not in _DTYPES:
        x = x.float()
    return _contiguous(x.expand(batch, kv_heads, 1, -1), keep), x.shape[-1], _DTYPES[x.dtype]


def _bias(request: Request, q_len: int, kv_heads: int, keep: list[Any]) -> Bias:
    """What the mask adds to logits."""
    mask = request.mask
    if mask.hides_nothing(q_len, request.stop):
        return Bias(0, 0, 0, 0, 0, 0, 0)
    x = mask.columns(q_len).contiguous()
    keep.append(x)
    head, query = (0 if x.shape[i] == 1 else x.stride(i) for i in (1, 2))
    return Bias(
        x.data_ptr(), _row(x), head * (x.shape[1] // kv_heads), head, query, x.shape[3],
        mask.first_column,
    )  # fmt: skip
