"""The operator of GPUs: Triton kernels. Under Triton's interpreter it runs on CPUs, slowly."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nexusquant.kernels.base import Entry, Partial, Request
from nexusquant.kernels.gpu import encode, tables
from nexusquant.kernels.gpu.call import Call, head_stride, strides
from nexusquant.kernels.reference import Reference, too_large
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import Book
from nexusquant.math.gains import LIMIT, boundaries

_ENCODED, _DECODED = 16, 64  # tokens of a program


class Triton(Reference):
    """See `nexusquant.kernels.base.Operator`; what the kernels do not take goes to the reference,
    which decodes with them."""

    name = "triton"

    def encode(
        self, x: Tensor, layout: RowLayout, book: Book, entry: Entry | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes and gains of x (batch, heads, tokens, dim), in one launch."""
        rows, codes, bad = launch_encode(x, layout, book, entry)
        if bad.item():
            raise too_large(int(bad), codes.numel())
        return rows, codes

    def decode(self, rows: Tensor, gains: Tensor, layout: RowLayout, book: Book) -> Tensor:
        """Vectors in code space, (batch, heads, tokens, dim) fp32."""
        rows, gains = (x if x.stride(2) == 1 else x.contiguous() for x in (rows, gains))
        batch, heads, tokens = gains.shape
        out = torch.zeros(batch, heads, tokens, 8 * layout.groups, device=rows.device)
        count = tables.chunk_count(layout)
        if count and tokens:
            encode.decode[(batch * heads, triton.cdiv(tokens, _DECODED), count)](
                rows, *rows.stride()[:2], gains, *gains.stride()[:2],
                tables.chunk_table(layout, count, rows.device), count,
                tables.coefficients(book, rows.device), tables.gain_values(rows.device), out,
                heads, tokens, out.shape[3], BT=_DECODED, num_warps=1,
            )  # fmt: skip
        return out

    def decode_attention(self, request: Request) -> Partial:
        """Attention to all parts at once, if they are few queries."""
        call = Call.of(request)
        return super().decode_attention(request) if call is None else call.run()


def launch_encode(
    x: Tensor, layout: RowLayout, book: Book, entry: Entry | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, gains, and (1,) int32: how many vectors no gain fits. Does not wait for the GPU."""
    batch, heads, tokens, dim = x.shape
    rows = torch.empty(batch, layout.row_bytes, tokens, dtype=torch.uint8, device=x.device)
    codes = torch.empty(batch, heads, tokens, dtype=torch.uint8, device=x.device)
    bad = torch.zeros(1, dtype=torch.int32, device=x.device)
    inside: tuple[Any, ...] = (bad, 0, *strides(None, bad), *strides(None, bad), bad, 0, 0)
    if entry is not None:
        forward = entry.forward.contiguous()
        inside = (
            forward, head_stride(forward), *strides(entry.mean, bad),
            *strides(entry.scale, bad), *strides(entry.empty, bad)[:3],
        )  # fmt: skip
    if tokens:
        encode.encode[(batch * heads, triton.cdiv(tokens, _ENCODED))](
            x, *x.stride(), *inside, *tables.rates_and_rows(layout, x.device),
            tables.level_table(book, x.device), boundaries(x.device),
            tables.gain_values(x.device), LIMIT, rows, codes, bad, heads, tokens, dim,
            layout.row_bytes, BT=_ENCODED, DP=max(16, triton.next_power_of_2(dim)),
            ENTER=entry is not None, HAS_SCALE=entry is not None and entry.scale is not None,
            HAS_EMPTY=entry is not None and entry.empty is not None, num_warps=8,
        )  # fmt: skip
    return rows, codes, bad
