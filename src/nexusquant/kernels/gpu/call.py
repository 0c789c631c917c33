"""One call of the attention kernels: what they are handed, and in which order they run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nexusquant.kernels.base import Coded, Exact, Partial, Request, exact, is_coded
from nexusquant.kernels.gpu import attend, merge, queries, tables
from nexusquant.kernels.gpu.parts import (
    PROGRAMS,
    TILE,
    Plan,
    make_plan,
    places_of,
    put,
    write_positions,
)
from nexusquant.kernels.plans import Plans
from nexusquant.pages import Pages, pages_of

ROWS = 16
"""Most queries per KV head, times their number."""
_MAX_DIM = 512
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


_plans: Plans[Plan | None] = Plans()


class Call:
    """Attention as one request asks for it."""

    def __init__(self, request: Request, pages: Pages, plan: Plan) -> None:
        self.request, self.pages, self.plan = request, pages, plan
        self.coded, self.uncoded = _kinds(request)
        self.batch, heads, self.q_len, self.dim = request.query.shape
        self.kv_heads = request.kv_heads
        self.heads = self.batch * self.kv_heads
        self.rows = heads // self.kv_heads * self.q_len
        self.padded = triton.next_power_of_2(self.rows)
        query = request.query.float() * request.scaling
        self.query = query.reshape(self.heads, self.rows, self.dim).contiguous()
        self.bias = self._bias()

    @staticmethod
    def of(request: Request) -> Call | None:
        """None for what the kernels do not take."""
        coded, uncoded = _kinds(request)
        batch, heads, q_len, dim = request.query.shape
        kv_heads, device = request.kv_heads, request.query.device
        if not (coded or uncoded) or heads // kv_heads * q_len > ROWS or dim > _MAX_DIM:
            return None
        if any(x.dtype not in _DTYPES for part in uncoded for x in (part.keys, part.values)):
            return None
        slots = max((part.slots.stop for part in coded), default=1)
        pages = pages_of(request.frame, slots, dim, device)
        if pages is None or pages.slots < slots:
            return None
        plan = _plans.of(coded, partial(make_plan, coded, batch, kv_heads, device))
        return None if plan is None else Call(request, pages, plan)

    def run(self) -> Partial:
        """All kernels, one after another."""
        space = self.coded[0].spaces[1] if self.coded else None
        dim = self.uncoded[0].values.shape[-1] if space is None else space.inverse.shape[-1]
        own, coded = self._exact(dim), self._coded(dim)
        output, lse = self._empty(self.heads, self.rows, dim), self._empty(self.heads, self.rows)
        inverse = self.query if space is None else space.inverse.contiguous()
        scale = None if space is None else space.scale
        mean = None if space is None else _vector(space.mean, dim)
        sinks = self.request.sink_logits
        block = 32
        merge.merge[(self.heads, triton.cdiv(dim, block))](
            *coded, *own, inverse, head_stride(inverse), *strides(scale, self.query),
            *strides(mean, self.query)[:3], self.query if sinks is None else sinks, output, lse,
            self.kv_heads, dim, ROWS=self.rows, Q_LEN=self.q_len, RP=self.padded,
            RM=max(16, self.padded), DP=_padded(dim), CB=block, HAS_SCALE=scale is not None,
            HAS_MEAN=mean is not None, HAS_SINKS=sinks is not None,
        )  # fmt: skip
        shape = (self.batch, self.kv_heads, -1, self.q_len)
        return Partial(output.view(*shape, dim), lse.view(*shape, 1))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def _bias(self) -> tuple[Any, ...]:
        """What the mask adds to logits, its strides, columns and the first of them."""
        mask = self.request.mask
        if mask.hides_nothing(self.q_len, self.request.stop):
            return self.query, 0, 0, 0, 0, 0
        x = mask.columns(self.q_len).contiguous().to(self.query.device)
        own = (0 if x.shape[i] == 1 else x.stride(i) for i in range(3))
        return x, *own, x.shape[3], mask.first_column

    @property
    def _shared(self) -> dict[str, Any]:
        """Constants of the kernels that compute logits."""
        return {
            "ROWS": self.rows, "Q_LEN": self.q_len, "RP": self.padded,
            "HAS_BIAS": self.bias[0] is not self.query,
            "HAS_CAP": self.request.softcap is not None,
        }  # fmt: skip

    def _exact(self, dim: int) -> tuple[Any, ...]:
        """Attention to uncoded tokens: output, largest logits, sums of weights, splits."""
        if not self.uncoded:
            return self.query, self.query, self.query, 0
        dtypes = [x.dtype for part in self.uncoded for x in (part.keys, part.values)]
        dtype = reduce(torch.promote_types, dtypes)
        keep: list[Tensor] = []
        table = torch.zeros(len(self.uncoded), attend.FIELDS.value, dtype=torch.int64)
        places = places_of(self.uncoded, table)
        for row, part in zip(table, self.uncoded, strict=True):
            put(row, attend.HEAD_MAP, self._heads(part), keep)
            for x, at in ((part.keys, attend.KEYS), (part.values, attend.VALUES)):
                x = x.to(dtype)
                x = put(row, at, x if x.stride(-1) == 1 else x.contiguous(), keep)
                row[at.value + 1 : at.value + 4] = torch.tensor(x.stride()[:3])
        most = max(part.slots.count for part in self.uncoded)
        splits = max(1, min(triton.cdiv(most, TILE), PROGRAMS // self.heads))
        out = self._empty(self.heads, splits, self.padded, dim)
        top, mass = (self._empty(self.heads, splits, self.padded) for _ in range(2))
        attend.exact[(self.heads, splits)](
            table.to(self.query.device), self._positions(self.uncoded, places), self.query,
            *self.bias, self.request.softcap or 0.0, out, top, mass, self.kv_heads,
            len(self.uncoded), splits, self.dim, dim, DP=_padded(self.dim), DVP=_padded(dim),
            BN=32, DTYPE=_DTYPES[dtype], **self._shared,
        )  # fmt: skip
        return out, top, mass, splits

    def _coded(self, dim: int) -> tuple[Any, ...]:
        """Attention to codes, values in code space: what `merge` is given of it."""
        if not self.coded:
            return (self.query,) * 5 + (0,)
        plan, device = self.plan, self.query.device
        book = tables.coefficients(self.coded[0].book, device)
        p = self._empty(self.heads, plan.tiles, self.padded, TILE, dtype=torch.float16)
        top, mass = (self._empty(self.heads, plan.tiles, self.padded) for _ in range(2))
        attend.logits[(self.heads, plan.tiles)](
            plan.table, self._positions(self.coded, plan.places), book,
            tables.gain_values(device), *self._page_queries(), len(self.coded), plan.tiles,
            *self.bias, self.request.softcap or 0.0, p, top, mass, self.kv_heads, self.dim,
            NP=self._pages_of_tile(), BN=TILE, num_warps=1, **self._shared,
        )  # fmt: skip
        splits = len(plan.split_part)
        out = self._empty(self.heads, splits, self.padded, dim)
        largest, masses = (self._empty(self.heads, splits, self.padded) for _ in range(2))
        attend.values[(self.heads, len(plan.work))](
            plan.table, book, plan.work, p, top, mass, out, largest, masses, self.kv_heads,
            plan.tiles, splits, dim, RP=self.padded, RV=max(16, self.padded), BN=TILE, num_warps=1,
        )  # fmt: skip
        return plan.table, plan.split_part, out, largest, masses, splits

    def _pages_of_tile(self) -> int:
        """Pages that tokens of one tile lie on, where there are most tokens; a power of two."""
        part = max(self.coded, key=lambda part: part.slots.count)
        slots = TILE * (part.slots.stop - part.slots.start) / max(part.slots.count, 1)
        wanted = int(slots * self.pages.count / self.pages.slots) + 2
        least = triton.cdiv(16, self.padded)
        return max(least, min(triton.next_power_of_2(wanted), 64 // self.padded, 8))

    def _page_queries(self) -> tuple[Any, ...]:
        """Queries in the code space of every page, and which page slots are on."""
        pages, space = self.pages, self.coded[0].spaces[0]
        inverse, mean = space.inverse.contiguous(), _vector(space.mean, self.dim)
        shape = (self.heads, pages.count, self.padded)
        out = self._empty(*shape, self.dim, dtype=torch.float16)
        size, constant = (self._empty(*shape) for _ in range(2))
        block = 64 // self.padded
        queries.page_queries[(self.heads, triton.cdiv(pages.count, block))](
            self.query, pages.turns, _row(pages.turns), pages.turns.shape[2],
            pages.turns.shape[1] // 2, pages.rotary, inverse, head_stride(inverse),
            *strides(space.scale, self.query), *strides(mean, self.query)[:3], out, size,
            constant, self.kv_heads, pages.count, self.dim, self.dim, ROWS=self.rows,
            RP=self.padded, PB=block, WP=_padded(self.dim), HAS_SCALE=space.scale is not None,
            HAS_MEAN=mean is not None, num_warps=8,
        )  # fmt: skip
        return out, size, constant, pages.page_of, _row(pages.page_of), pages.count

    def _positions(self, parts: Sequence[Coded | Exact], places: int) -> Tensor:
        """Slots of all parts that store theirs. Not kept: they would be larger than gains."""
        out, at = self._empty(max(places, 1), dtype=torch.int32), 0
        for part in parts:
            if part.slots.stored is not None:
                at += write_positions(part.slots, out[at:])
        return out

    def _heads(self, part: Coded | Exact) -> Tensor:
        return tables.head_map(part.heads, self.kv_heads, self.query.device)


def _kinds(request: Request) -> tuple[list[Coded], list[Exact]]:
    """Coded and other parts that hold tokens."""
    parts = [part for part in request.parts if part.slots.count]
    coded = [part for part in parts if is_coded(part)]
    return coded, [exact(part) for part in parts if not is_coded(part)]


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _row(x: Tensor) -> int:
    """Elements from one batch row to the next, 0 if all share one."""
    return 0 if len(x) == 1 else x.stride(0)


def head_stride(x: Tensor) -> int:
    """Elements from one head of a transform to the next, 0 if all share one."""
    return 0 if len(x) == 1 else x.stride(0)


def strides(x: Tensor | None, default: Tensor) -> tuple[Any, ...]:
    """x (batch or 1, heads or 1, 1, n or 1), and its strides by batch row, head and dimension."""
    if x is None:
        return default, 0, 0, 0
    return x, *(0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1, 3))


def _vector(x: Tensor, dim: int) -> Tensor | None:
    """A mean; None for the single number zero."""
    return x if x.shape[-1] == dim and dim > 1 else None
