"""The Triton kernels against the reference: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.kernel_cases import INTERPRETED

pytest.importorskip("triton", minversion=INTERPRETED)

from nexusquant import NexusCache, kernels
from nexusquant.compressor import compress
from nexusquant.errors import NonFiniteError
from nexusquant.frame import KeyFrame
from nexusquant.kernels.base import Entry, Request
from nexusquant.kernels.gpu.operator import Triton
from nexusquant.kernels.gpu.parts import write_positions
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.mask import Mask
from nexusquant.math.e8 import Book
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import ExactTokens
from tests.attention_cases import exact_part, rope_frame
from tests.chunks import ragged, shared, uneven
from tests.kernel_cases import check, layout_of, layouts, same_but_for_ties, tiers
from tests.tiny_checkpoint import tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITHIN = 4e-3
"""Codewords and weights are fp16: errors of outputs and logits of size 1 to 8."""

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "on_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, where NaN is the point
]


@pytest.fixture
def on_device() -> Iterator[None]:
    """All tensors are made where the kernels run."""
    with DEVICE:
        yield


@pytest.fixture
def triton() -> Triton:
    return Triton()


@pytest.mark.parametrize(
    ("group", "page", "batch", "total"),
    [
        (1, 0, 1, 500),
        (3, 32, 2, 350),
        pytest.param(4, 1, 1, 250, marks=pytest.mark.slow),
    ],
)
def test_tiers_that_share_a_space(
    triton: Triton, group: int, page: int, batch: int, total: int
) -> None:
    """Several tiles and splits, gaps of every kind, one row shorter than the others."""
    heads, dim = 2, 64
    order = torch.rand(batch, heads, total - 4).argsort(-1) + 4
    slots = [x.sort(-1).values for x in order.split([60, 110, total - 4 - 170], -1)]
    slots[1][-1, :, 80:] = -1
    parts = tiers(
        [layout_of(heads, 8, top) for top in (7, 4, 2)], slots, batch=batch, heads=heads, dim=dim
    )
    sinks = exact_part(torch.arange(4).expand(batch, 1, -1), heads, dim, dim)
    tail = exact_part(torch.arange(total, total + 9).expand(batch, 1, -1), heads, dim, dim)
    frame = rope_frame(total + 9, dim, page)
    query = torch.randn(batch, heads * group, 1, dim)
    request = Request(query, [sinks, *parts, tail], Mask(None, total + 8), frame, dim**-0.5)
    check(triton, request, within=WITHIN)
    check(
        triton, replace(request, softcap=4.0, sink_logits=torch.randn(heads * group)), within=WITHIN
    )
    seen = torch.rand(batch, 1, 1, total + 9) < 0.8
    seen[..., 0] = True
    check(triton, replace(request, mask=Mask(seen, total + 8)), within=WITHIN)


@pytest.mark.parametrize(
    ("dim", "group", "q_len"), [(40, 3, 4), (72, 16, 1), (80, 2, 1), (96, 7, 2), (256, 1, 1)]
)
def test_shapes_of_models(triton: Triton, dim: int, group: int, q_len: int) -> None:
    """Dimensions and groups that are no powers of two, and several queries with a window."""
    parts = tiers(
        [layout_of(2, dim // 8, 4)], [torch.arange(0, 300, 2).expand(1, 1, -1)], batch=1, heads=2,
        dim=dim,
    )  # fmt: skip
    tail = exact_part(torch.arange(300, 300 + q_len).expand(1, 1, -1), 2, dim, dim)
    query, frame = torch.randn(1, 2 * group, q_len, dim), rope_frame(300 + q_len, dim, 32)
    request = Request(query, [*parts, tail], Mask(None, 300), frame, dim**-0.5)
    check(triton, request, within=WITHIN)
    if q_len > 1:
        check(triton, replace(request, mask=Mask(None, 300, 40, 100)), within=WITHIN)


def test_heads_with_tokens_of_their_own(triton: Triton) -> None:
    """Parts of all heads, of one and of two, coded and not."""
    frame = rope_frame(140, 32, 32)
    source = uneven(120, valid=torch.arange(120) >= torch.tensor([[0], [25]]))
    stored = compress(shared("e8", sinks=0), Stored(), source, frame)
    assert ragged(stored)
    tail = replace(exact_part(torch.arange(120, 125)[None, None], 1, 32, 32), heads=(2,))
    tail = tail.map(lambda x: x.expand(2, *x.shape[1:]))
    query = torch.randn(2, 6, 1, 32)
    request = Request(query, [*stored.parts(), tail], Mask(None, 124), frame, 0.2)
    check(triton, request, within=WITHIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tails_of_any_dtype(triton: Triton, dtype: torch.dtype) -> None:
    parts = tiers([layout_of(2, 4, 3)], [torch.arange(90)[None, None]], batch=1, heads=2, dim=32)
    tail = ExactTokens(*torch.randn(2, 1, 2, 7, 32).to(dtype), Slots(90, 7))
    query, frame = torch.randn(1, 4, 1, 32), KeyFrame(None, 0)
    request = Request(query, [*parts, tail], Mask(None, 96), frame, 0.1)
    check(triton, request, taken=dtype != torch.float64, within=WITHIN)
    check(triton, replace(request, parts=[tail]), taken=dtype != torch.float64, within=WITHIN)


def test_error_is_that_of_half_precision(triton: Triton) -> None:
    """At most twice that of PyTorch on the same keys and values in fp16 (root mean squares)."""
    heads, dim, total = 4, 128, 400
    (part,) = tiers(
        [layout_of(heads, 16, 5)], [torch.arange(total)[None, None]], batch=1, heads=heads, dim=dim
    )
    frame, query = rope_frame(total, dim, 32), 2 * torch.randn(1, heads, 1, dim)
    request = Request(query, [part], Mask(None, total - 1), frame, dim**-0.5)
    mine = triton.decode_attention(request).output.view(1, heads, 1, dim)
    exact = [frame.leave(part.keys(), part.slots.positions(DEVICE)), part.values()]
    truth = scaled_dot_product_attention(*(x.double() for x in (query, *exact)))
    half = scaled_dot_product_attention(*(x.half() for x in (query, *exact)))
    errors = [(x.double() - truth).square().mean().sqrt().item() for x in (mine, half)]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("where", ["query", "tail"])
def test_nan_is_not_swallowed(triton: Triton, where: str) -> None:
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    tail, query = exact_part(torch.arange(50, 53)[None, None], 1, 16, 16), torch.randn(1, 2, 1, 16)
    (query[0, 1, 0] if where == "query" else tail.keys[0, 0, 1])[3] = torch.nan
    request = Request(query, [*parts, tail], Mask(None, 52), KeyFrame(None, 0), 0.25)
    output = triton.decode_attention(request).output[0, 0, :, 0]
    assert output[1].isnan().all()
    assert output[0].isnan().all() == (where == "tail")


def test_queries_that_see_nothing(triton: Triton) -> None:
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=2, heads=1, dim=16)
    seen = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    seen[1] = False
    query = torch.randn(2, 2, 1, 16)
    request = Request(query, parts, Mask(seen, 49), KeyFrame(None, 0), 0.25)
    check(triton, request, within=WITHIN)
    assert triton.decode_attention(request).lse[1].isneginf().all()


def test_rows_masked_by_the_least_number(triton: Triton) -> None:
    """Fully padded rows of eager models: uniform attention, not none."""
    parts = tiers([layout_of(1, 2, 3)], [torch.arange(50)[None, None]], batch=1, heads=1, dim=16)
    mask = Mask(torch.full((1, 1, 1, 50), torch.finfo(torch.float32).min), 49)
    request = Request(torch.randn(1, 2, 1, 16), parts, mask, KeyFrame(None, 0), 0.25)
    mine, theirs = (one.decode_attention(request).output for one in (triton, Reference()))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=WITHIN)


def test_parts_without_tokens(triton: Triton) -> None:
    some, none = torch.arange(50)[None, None], torch.zeros(1, 1, 0, dtype=torch.int64)
    part, empty = tiers([layout_of(1, 2, 3)] * 2, [some, none], batch=1, heads=1, dim=16)
    query = torch.randn(1, 2, 1, 16)
    for parts in ([empty], [empty, part], [part, empty]):
        request = Request(query, parts, Mask(None, 49), KeyFrame(None, 0), 0.25)
        check(triton, request, taken=False, within=WITHIN)


def test_nan_that_is_not_coded(triton: Triton) -> None:
    x = torch.randn(1, 1, 20, 16)
    x[0, 0, 7, 9] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 20 vectors"):
        triton.encode(x, RowLayout(((4, 0),)), Book())


@settings(max_examples=15, deadline=None)
@given(layouts(), st.integers(1, 2), st.sampled_from([0, 1, 17, 65]), st.booleans(), st.booleans())
def test_codes_are_those_of_the_reference(
    layout: RowLayout, batch: int, tokens: int, uniform: bool, enters: bool
) -> None:
    dim = 8 * layout.groups
    x = torch.randn(batch, layout.heads, tokens, dim)
    x *= 4 * torch.rand(batch, layout.heads, tokens, 1) ** 2
    x[:, :, ::5, 0] *= 20  # far outliers ask for other gains
    book, entry = Book("uniform" if uniform else "companded", 1.1), None
    if enters:
        entry = Entry(
            torch.randn(layout.heads, dim, dim) / dim**0.5, torch.randn(1, layout.heads, 1, dim),
            0.5 + torch.rand(batch, layout.heads, 1, 1), torch.rand(batch, 1, tokens, 1) < 0.1,
        )  # fmt: skip
    expected = Reference().encode(x, layout, book, entry)
    rows, gains = Triton().encode(x, layout, book, entry)
    assert (gains != expected[1]).sum() <= 1, "more than ties"
    if torch.equal(gains, expected[1]):
        same_but_for_ties(rows, expected, layout, book)
    back = Triton().decode(rows, gains, layout, book)
    torch.testing.assert_close(back, Reference().decode(rows, gains, layout, book))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9])
def test_what_no_gain_fits_is_counted(triton: Triton, bad: float) -> None:
    x = torch.randn(1, 2, 40, 16)
    x[0, 1, 37, 3] = x[0, 0, 4, 0] = bad
    with pytest.raises(NonFiniteError, match="2 of 80 vectors"):
        triton.encode(x, RowLayout(((4, 0), (2, 0))), Book())


@pytest.mark.parametrize("span", [300, 4_000, 90_000, 5_000_000])
@pytest.mark.parametrize("dense", [True, False])
def test_positions(span: int, dense: bool) -> None:
    """Gaps of every width, and bitmaps, over several blocks."""
    count = min(span * 4 // 5, 3_000) if dense else 60
    keep = torch.rand(2, 2, span if not dense else count * 5 // 4).argsort(-1)[..., :count]
    index = keep.sort(-1).values + 7
    index[1, :, count // 2 :] = -1
    slots = Slots.of(index)
    out = torch.full((2, 2, count), -7, dtype=torch.int32)
    assert write_positions(slots, out) == out.numel()
    assert torch.equal(out.long(), slots.positions(DEVICE))


def test_a_model_with_this_operator(monkeypatch: pytest.MonkeyPatch, triton: Triton) -> None:
    """The same tokens as with the reference, through prefill, encoding and decoding."""
    model = tiny_model(320).to(DEVICE)
    ids = torch.randint(2, 320, (1, 90), generator=torch.Generator(DEVICE).manual_seed(0))
    logits = []
    for operator in (Reference(), triton):
        monkeypatch.setattr(kernels, "_chosen", lambda device, forced, it=operator: it)
        cache = NexusCache(model, "high")
        with torch.no_grad():
            model(ids[:, :85], cache=cache)
            steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(85, 90)]
        logits.append(torch.cat(steps, 1))
    assert cache.bits_per_element < 16
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
