"""Attention of fast operators against the reference, in memory full of NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nexusquant.errors import UnsupportedError
from nexusquant.frame import KeyFrame
from nexusquant.kernels.base import Operator, Request
from nexusquant.kernels.reference import Reference
from nexusquant.mask import Mask
from nexusquant.slots import Slots
from nexusquant.tokens import ExactTokens
from tests.attention_cases import exact_part, rope_frame
from tests.kernel_cases import check, layout_of, tiers

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("page", [0, 1, 32])
@pytest.mark.parametrize("batch", [1, 2])
def test_tiers_that_share_a_space(fast: Operator, group: int, page: int, batch: int) -> None:
    """Over 1,500 slots: several blocks of pages, splits, tiles, and gaps of every kind."""
    heads, dim, total = 2, 64, 1500
    order = torch.rand(batch, heads, total - 4).argsort(-1) + 4
    slots = [x.sort(-1).values for x in order.split([150, 500, total - 4 - 650], -1)]
    slots[1][-1, :, 400:] = -1  # a shorter row
    parts = tiers(
        [layout_of(heads, 8, top) for top in (5, 3, 2)], slots, batch=batch, heads=heads, dim=dim
    )
    sinks = exact_part(torch.arange(4).expand(batch, 1, -1), heads, dim, dim)
    tail = exact_part(torch.arange(total, total + 9).expand(batch, 1, -1), heads, dim, dim)
    frame = rope_frame(total + 9, dim, page)
    query = 2 * torch.randn(batch, heads * group, 1, dim)
    request = Request(query, [sinks, *parts, tail], Mask(None, total + 8), frame, dim**-0.5)
    check(fast, request)
    check(fast, replace(request, softcap=4.0, sink_logits=torch.randn(heads * group)))
    seen = torch.rand(batch, 1, 1, total + 9) < 0.8
    seen[..., 0] = True
    check(fast, replace(request, mask=Mask(seen, total + 8)))


@pytest.mark.parametrize("q_len", [2, 4, 5])
def test_a_few_queries_at_once(fast: Operator, q_len: int) -> None:
    parts = tiers(
        [layout_of(3, 5, 3)], [torch.arange(0, 600, 2).expand(2, 1, -1)], batch=2, heads=3, dim=40
    )
    tail = exact_part(torch.arange(600, 600 + q_len).expand(2, 1, -1), 3, 40, 40)
    query, frame = torch.randn(2, 9, q_len, 40), rope_frame(600 + q_len, 40, 32)
    request = Request(query, [*parts, tail], Mask(None, 600), frame, 0.2)
    check(fast, request)
    check(fast, replace(request, mask=Mask(None, 600, 40, 100)))  # a sliding window


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tails_of_any_dtype(fast: Operator, dtype: torch.dtype) -> None:
    parts = tiers([layout_of(2, 9, 3)], [torch.arange(90)[None, None]], batch=1, heads=2, dim=72)
    tail = ExactTokens(*torch.randn(2, 1, 2, 7, 72).to(dtype), Slots(90, 7))
    query, frame = torch.randn(1, 4, 1, 72), KeyFrame(None, 0)
    request = Request(query, [*parts, tail], Mask(None, 96), frame, 0.1)
    check(fast, request, taken=dtype != torch.float64)


def test_a_plan_is_not_used_for_other_parts(fast: Operator) -> None:
    """Appending to one tier leaves the others, and their plan's key, as they were."""
    slots = [torch.arange(i, 200, 2).view(1, 1, -1) for i in (0, 1)]
    one, other = tiers([layout_of(1, 2, 4)] * 2, slots, batch=1, heads=1, dim=16)
    query, frame = torch.randn(1, 2, 1, 16), rope_frame(300, 16, 32)
    request = Request(query, [one, other], Mask(None, 299), frame, 0.25)
    check(fast, request)
    more = replace(other, slots=Slots.of(slots[1] + 100))
    check(fast, replace(request, parts=[one, more]))
    check(fast, request)


def test_a_sink_that_is_wider_than_its_keys(fast: Operator) -> None:
    """What would overflow in fp16 is kept in fp32, and stays so."""
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(4, 60)[None, None]], batch=1, heads=1, dim=16)
    keys, values = torch.randn(1, 1, 4, 16).half(), 1e6 * torch.randn(1, 1, 4, 16)
    sinks, query = ExactTokens(keys, values, Slots(0, 4)), torch.randn(1, 2, 1, 16)
    request = Request(query, [sinks, *parts], Mask(None, 60), KeyFrame(None, 0), 0.25)
    mine, theirs = (one.decode_attention(request).output for one in (fast, Reference()))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1)


@pytest.mark.parametrize("where", ["query", "tail"])
def test_nan_is_not_swallowed(fast: Operator, where: str) -> None:
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    tail, query = exact_part(torch.arange(50, 53)[None, None], 1, 16, 16), torch.randn(1, 2, 1, 16)
    (query[0, 1, 0] if where == "query" else tail.keys[0, 0, 1])[3] = torch.nan
    request = Request(query, [*parts, tail], Mask(None, 52), KeyFrame(None, 0), 0.25)
    output = fast.decode_attention(request).output[0, 0, :, 0]
    assert output[1].isnan().all()
    assert output[0].isnan().all() == (where == "tail")


@pytest.mark.parametrize("cap", [50.0, 0.01])
def test_logits_far_above_the_softcap(fast: Operator, cap: float) -> None:
    """The exponential of twice their ratio overflows."""
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    tail, query = exact_part(torch.arange(50, 53)[None, None], 1, 16, 16), torch.randn(1, 2, 1, 16)
    request = Request(query, [*parts, tail], Mask(None, 52), KeyFrame(None, 0), 50 * cap, cap)
    check(fast, request)


def test_a_query_before_stored_tokens(fast: Operator) -> None:
    """It does not see what is behind it, also where nothing else is masked."""
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    query = torch.randn(1, 2, 1, 16)
    for mask in (Mask(None, 20), Mask(None, 30, first_column=35)):
        check(fast, Request(query, parts, mask, KeyFrame(None, 0), 0.25))


def test_rows_masked_by_the_least_number(fast: Operator) -> None:
    """Fully padded rows of eager models: uniform attention, not none."""
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    mask = Mask(torch.full((1, 1, 1, 50), torch.finfo(torch.float32).min), 49)
    request = Request(torch.randn(1, 2, 1, 16), parts, mask, KeyFrame(None, 0), 0.25)
    mine, theirs = (one.decode_attention(request).output for one in (fast, Reference()))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [2, 20])
def test_parts_without_tokens(fast: Operator, rows: int) -> None:
    (part,) = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    (none,) = tiers(
        [layout_of(1, 2, 3)], [torch.zeros(1, 1, 0, dtype=torch.int64)], batch=1, heads=1, dim=16
    )
    request = Request(torch.randn(1, rows, 1, 16), [none], Mask(None, 49), KeyFrame(None, 0), 0.25)
    for parts in ([none], [none, part], [part, none]):
        check(fast, replace(request, parts=parts), taken=False)


def test_no_part_of_all_heads(fast: Operator) -> None:
    tail = replace(exact_part(torch.arange(9)[None, None], 1, 16, 16), heads=(1,))
    request = Request(torch.randn(1, 2, 1, 16), [tail], Mask(None, 9), KeyFrame(None, 0), 0.25)
    with pytest.raises(UnsupportedError, match="needs one part of all heads"):
        fast.decode_attention(request)
