"""Requests for operators, and what they must agree on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.kernels import operators
from nexusquant.kernels.base import Operator, Request
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, Book
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens

INTERPRETED = "3.3" if torch.cuda.is_available() else "3.9"
"""The oldest Triton that can run the kernels: earlier interpreters fail on NumPy 2.4."""
FAST = [name for name, reason in operators("cpu").items() if not reason and name != "reference"]


def tiers(
    layouts: list[RowLayout], slots: list[Tensor], *, batch: int, heads: int, dim: int,
    centred: bool = True,
) -> list[CodedTokens]:  # fmt: skip
    """Parts in one code space, each with a layout and slots (batch, heads or 1, n) of its own."""
    centres = tuple(
        Centre(torch.randn(batch, heads, 1, dim), 0.5 + torch.rand(batch, heads, 1, dim))
        if centred
        else Centre(None, None)
        for _ in range(2)
    )
    basis = Orthonormal("hadamard", dim)
    return [
        CodedTokens.encode(
            *(torch.randn(batch, heads, at.shape[2], dim) for _ in range(2)), Slots.of(at),
            (centres[0], centres[1]), (Quantizer(layout, basis), Quantizer(layout, basis)),
        )
        for layout, at in zip(layouts, slots, strict=True)
    ]  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> RowLayout:
    """Any rates, for one to three heads."""
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    head = st.tuples(*[st.sampled_from((0, *BITS))] * groups)
    return RowLayout(tuple(draw(st.lists(head, min_size=heads, max_size=heads))))


def layout_of(heads: int, groups: int, top: int) -> RowLayout:
    return RowLayout(
        tuple(tuple(max(top - (g + h) // 2, 0) for g in range(groups)) for h in range(heads))
    )


def same_but_for_ties(
    rows: Tensor, expected: tuple[Tensor, Tensor], layout: RowLayout, book: Book
) -> None:
    """Rows of the same gains: few words differ."""
    theirs, gains = expected
    mine, other = (Reference().decode(x, gains, layout, book) for x in (rows, theirs))
    words = (mine != other).unflatten(-1, (-1, 8)).any(-1)
    assert words.sum() <= 1e-4 * words.numel() + 2, "more than ties"


def check(fast: Operator, request: Request, taken: bool = True, within: float = 2e-5) -> None:
    """Equal to the reference, and not by asking it (unless not `taken`)."""
    theirs = Reference().decode_attention(request)
    with pytest.MonkeyPatch.context() as patch:
        if taken:
            patch.delattr(Reference, "decode_attention")
        mine = fast.decode_attention(request)
    torch.testing.assert_close(mine.output, theirs.output, rtol=1e-4, atol=within)
    torch.testing.assert_close(mine.lse, theirs.lse, rtol=1e-4, atol=within)
