"""Pages of keys: rotations of every form as one matrix, and kernels that use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.kernels.base import Operator, Request
from nexusquant.mask import Mask
from nexusquant.math.rope import RopeTable, Span
from nexusquant.pages import pages_of
from tests.attention_cases import CPU
from tests.kernel_cases import check, layout_of, tiers

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos[:, None] + other * sin[:, None]

    return turn(q), turn(k)


def strange(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Not a rotation of pairs: every dimension depends on all."""
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + q.cumsum(-1) * sin, k * cos + k.cumsum(-1) * sin


def table(apply: Callable[..., Any], tiling: str, width: int, slots: int) -> RopeTable:
    made = RopeTable(apply)
    frequencies = 1.0 / 50 ** (torch.arange(width // 2) / (width // 2))
    made.extend(0, Span(torch.arange(slots)[None].int() + 5, frequencies, 1.2, tiling))
    return made


@pytest.mark.parametrize("width", [16, 8])
def test_interleaved_and_partial_rotation(fast: Operator, width: int) -> None:
    frame = KeyFrame(table(interleaved, "pairs", width, 130), 32)
    pages = pages_of(frame, 130, 16, CPU)
    assert pages is not None
    assert pages.turns.shape == (1, width + 1, 16), "one row per cosine, per sine, and for the rest"
    assert pages.count == 5
    assert (pages.rotary[width:, 0] == -1).all()
    parts = tiers([layout_of(1, 2, 5)], [torch.arange(130)[None, None]], batch=1, heads=1, dim=16)
    query = torch.randn(1, 2, 1, 16)
    check(fast, Request(query, parts, Mask(None, 129), frame, 0.25))


def test_rotations_of_no_known_form_are_left_to_the_reference(fast: Operator) -> None:
    frame = KeyFrame(table(strange, "halves", 16, 130), 32)
    assert pages_of(frame, 130, 16, CPU) is None
    parts = tiers([layout_of(1, 2, 5)], [torch.arange(130)[None, None]], batch=1, heads=1, dim=16)
    check(fast, Request(torch.randn(1, 2, 1, 16), parts, Mask(None, 129), frame, 0.25), taken=False)


def test_captured_rows_are_pages_of_one_slot(fast: Operator) -> None:
    made = RopeTable(interleaved)
    angles = torch.rand(1, 60, 8).repeat_interleave(2, -1)
    made.extend(0, Span(rows=(angles.cos(), angles.sin())))
    frame = KeyFrame(made, 32)
    pages = pages_of(frame, 60, 16, CPU)
    assert pages is not None
    assert pages.count == 60
    parts = tiers([layout_of(1, 2, 5)], [torch.arange(60)[None, None]], batch=1, heads=1, dim=16)
    check(fast, Request(torch.randn(1, 2, 1, 16), parts, Mask(None, 59), frame, 0.25))


def test_pages_of_rows_that_begin_elsewhere_and_of_several_spans() -> None:
    """Left padding shifts positions, and dynamic scaling brings other frequencies."""
    made = RopeTable(interleaved)
    frequencies = torch.tensor([1.0, 0.1])
    positions = torch.stack([torch.arange(70), torch.arange(70) - 20]).clamp(min=0).int()
    made.extend(0, Span(positions, frequencies, 1.0, "pairs"))
    made.extend(70, Span(positions[:, -9:] + 9, 2 * frequencies, 1.0, "pairs"))
    frame = KeyFrame(made, 32)
    pages = pages_of(frame, 79, 4, CPU)
    assert pages is not None
    assert pages_of(frame, 79, 4, CPU) is pages, "once per forward pass"
    assert pages.page_of.shape == (2, 79)
    cos, sin = made.rows(32)
    for row, slot in itertools.product(range(2), range(79)):
        at = pages.turns[row, :, pages.page_of[row, slot]]
        expected = torch.cat([cos[row, slot, ::2], sin[row, slot, ::2], torch.ones(1)])
        torch.testing.assert_close(at, expected)
