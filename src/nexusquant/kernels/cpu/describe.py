"""Tokens, code spaces and masks as what kernels are handed (`arguments`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nexusquant.kernels.base import Coded, Exact, Request, Space
from nexusquant.kernels.cpu import arguments as at
from nexusquant.kernels.cpu.arguments import Bias, Side
from nexusquant.kernels.cpu.tables import group_table, head_map
from nexusquant.slots import Slots

DTYPES = {torch.float32: at.FP32, torch.float16: at.FP16, torch.bfloat16: at.BF16}
_KINDS = {torch.uint8: at.GAPS_8, torch.int16: at.GAPS_16, torch.int32: at.GAPS_32}
NOWHERE = Side(0, 1, 0, 0, 0, 0, 0, 0, 0)


def row_stride(x: Tensor) -> int:
    """Elements from one batch row to the next, 0 if all share one."""
    return 0 if len(x) == 1 else x.stride(0)


def _contiguous(x: Tensor, keep: list[Any]) -> int:
    """Address of x, or of a copy that is contiguous."""
    whole = x.contiguous()
    keep.append(whole)
    return whole.data_ptr()


def address(x: np.ndarray, keep: list[Any]) -> int:
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


def describe_coded(part: Coded, kv_heads: int, row: np.ndarray, keep: list[Any]) -> None:
    """A line about a coded part."""
    keys, values = part.layouts
    row[at.KEY_ROWS], row[at.VALUE_ROWS], row[at.GAINS] = (
        _contiguous(x, keep) for x in (part.key_rows, part.value_rows, part.gains)
    )
    row[at.KEY_GROUPS], row[at.KEY_WIDTH] = address(group_table(keys), keep), keys.groups + 1
    row[at.VALUE_GROUPS] = address(group_table(values), keep)
    row[at.VALUE_WIDTH], row[at.HEADS] = values.groups + 1, keys.heads
    row[at.KEY_BYTES], row[at.VALUE_BYTES] = keys.row_bytes, values.row_bytes
    row[at.HEAD_MAP] = address(head_map(part.heads, kv_heads), keep)
    _slots(part.slots, row, keep)


def describe_exact(part: Exact, kv_heads: int, row: np.ndarray, keep: list[Any]) -> None:
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
    row[at.DTYPE] = DTYPES[keys.dtype]
    row[at.HEAD_MAP] = address(head_map(part.heads, kv_heads), keep)
    _slots(part.slots, row, keep)


def side(space: Space, batch: int, kv_heads: int, width: int, keep: list[Any]) -> Side:
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
    if x.dtype not in DTYPES:
        x = x.float()
    return _contiguous(x.expand(batch, kv_heads, 1, -1), keep), x.shape[-1], DTYPES[x.dtype]


def bias(request: Request, q_len: int, kv_heads: int, keep: list[Any]) -> Bias:
    """What the mask adds to logits."""
    mask = request.mask
    if mask.hides_nothing(q_len, request.stop):
        return Bias(0, 0, 0, 0, 0, 0, 0)
    x = mask.columns(q_len).contiguous()
    keep.append(x)
    head, query = (0 if x.shape[i] == 1 else x.stride(i) for i in (1, 2))
    return Bias(
        x.data_ptr(), row_stride(x), head * (x.shape[1] // kv_heads), head, query, x.shape[3],
        mask.first_column,
    )  # fmt: skip
