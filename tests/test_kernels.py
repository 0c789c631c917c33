"""Fast operators against the reference, on odd shapes, in memory full of NaN."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.errors import ConfigError, NonFiniteError
from nexusquant.frame import KeyFrame
from nexusquant.kernels import _chosen, _made, operator_for, operators, use_operator
from nexusquant.kernels.base import Operator, Request
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.mask import Mask
from nexusquant.math.e8 import BITS, Book
from nexusquant.math.rope import RopeTable, Span
from nexusquant.pages import pages_of
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens, ExactTokens
from tests.attention_cases import CPU, exact_part, rope_frame

pytestmark = pytest.mark.usefixtures("poisoned_empty")
FAST = [name for name, reason in operators("cpu").items() if not reason and name != "reference"]


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> Operator:
    return _made(request.param)


@st.composite
def layouts(draw: st.DrawFn) -> RowLayout:
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    head = st.tuples(*[st.sampled_from((0, *BITS))] * groups)
    return RowLayout(tuple(draw(st.lists(head, min_size=heads, max_size=heads))))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 2), st.sampled_from([0, 1, 15, 16, 17, 33, 600]), st.booleans())
def test_codes_are_those_of_the_reference(
    layout: RowLayout, batch: int, tokens: int, uniform: bool
) -> None:
    x = torch.randn(batch, layout.heads, tokens, 8 * layout.groups)
    x *= 4 * torch.rand(batch, layout.heads, tokens, 1) ** 2
    x[:, :, ::5, 0] *= 20  # far outliers ask for other gains
    book = Book("uniform" if uniform else "companded", 1.1)
    expected = Reference().encode(x, layout, book)
    for name in FAST:
        rows, gains = _made(name).encode(x, layout, book)
        assert torch.equal(gains, expected[1])
        differ = (rows != expected[0]).sum()
        assert differ <= 1e-4 * rows.numel() + 2, "more than ties"
        back = _made(name).decode(rows, gains, layout, book)
        assert back.dtype == torch.float32
        torch.testing.assert_close(back, Reference().decode(rows, gains, layout, book))


def test_slices_of_rows_are_decoded(fast: Operator) -> None:
    layout, book = RowLayout(((3, 0, 5), (1, 2, 0))), Book()
    rows, gains = fast.encode(torch.randn(2, 2, 70, 24), layout, book)
    some = slice(19, 52)
    whole = fast.decode(rows, gains, layout, book)[:, :, some]
    assert torch.equal(fast.decode(rows[:, :, some], gains[:, :, some], layout, book), whole)


def test_nothing_is_written_beside_the_codes(fast: Operator, monkeypatch: Any) -> None:
    """The last vector of 16 lanes is not full."""
    layout, made = RowLayout(((2, 1), (0, 3))), []
    empty = torch.empty

    def guarded(*shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") != torch.uint8:
            return empty(*shape, **options)
        count = torch.Size(shape).numel()
        made.append(torch.full((count + 64,), 77, dtype=torch.uint8))
        return made[-1][32 : 32 + count].view(*shape)

    monkeypatch.setattr(torch, "empty", guarded)
    fast.encode(torch.randn(1, 2, 21, 16), layout, Book())
    assert len(made) == 2
    for memory in made:
        assert (memory[:32] == 77).all()
        assert (memory[-32:] == 77).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9])
@pytest.mark.parametrize("group", [0, 1])
def test_what_no_gain_fits_is_counted(fast: Operator, bad: float, group: int) -> None:
    x = torch.randn(1, 2, 40, 16)
    x[0, 1, 37, 8 * group + 3] = x[0, 0, 4, 8 * group] = bad
    if bad == 1e9 and group == 1:
        return  # nobody sees how large an uncoded coordinate is
    with pytest.raises(NonFiniteError, match="2 of 80 vectors"):
        fast.encode(x, RowLayout(((4, 0), (2, 0))), Book())


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


def layout_of(heads: int, groups: int, top: int) -> RowLayout:
    return RowLayout(
        tuple(tuple(max(top - (g + h) // 2, 0) for g in range(groups)) for h in range(heads))
    )


def check(fast: Operator, request: Request, taken: bool = True) -> None:
    """Equal to the reference, and not by asking it (unless not `taken`)."""
    theirs = Reference().decode_attention(request)
    with pytest.MonkeyPatch.context() as patch:
        if taken:
            patch.delattr(Reference, "decode_attention")
        mine = fast.decode_attention(request)
    torch.testing.assert_close(mine.output, theirs.output, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mine.lse, theirs.lse, rtol=1e-4, atol=2e-5)


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


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos[:, None] + other * sin[:, None]

    return turn(q), turn(k)


def strange(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Not a rotation of pairs: every dimension depends on all."""
    cos, sin = cos[:, None], sin[:, None]
    return tuple(x * cos + x.cumsum(-1) * sin for x in (q, k))  # type: ignore[return-value]


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


def test_choosing_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operator_for(CPU).name == (FAST[0] if FAST else "reference")
    use_operator("reference")
    assert operator_for(CPU).name == "reference"
    use_operator(None)
    with pytest.raises(ConfigError, match="unknown operator 'fast'; known: numba, reference"):
        use_operator("fast")
    assert operator_for(torch.device("meta")).name == "reference"


def test_without_numba_the_reference_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (_made, _chosen):
        made.cache_clear()
    monkeypatch.setitem(sys.modules, "nexusquant.kernels.cpu.operator", None)
    try:
        assert operator_for(CPU).name == "reference"
        assert "pip install" in operators("cpu")["numba"]
        with pytest.raises(ConfigError, match="operator 'numba' cannot run"):
            use_operator("numba")
    finally:
        for made in (_made, _chosen):
            made.cache_clear()


@pytest.mark.skipif(not FAST, reason="needs Numba")
def test_kernels_leave_the_number_of_threads_alone() -> None:
    """Numba's OpenMP threads are PyTorch's, and so is their number."""
    code = (
        "import torch; from nexusquant import NexusQuantSimple; x = torch.randn(1, 1, 100, 64);"
        " NexusQuantSimple().encode(x, x); print(torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1"]


@pytest.mark.skipif(not FAST, reason="needs Numba")
def test_many_threads_where_numba_takes_one_caller_at_a_time() -> None:
    """Its own thread pool, for want of OpenMP, ends the process when two threads call at once."""
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor;"
        " from nexusquant import NexusQuantSimple; x = torch.randn(1, 4, 4000, 64);"
        " work = lambda _: NexusQuantSimple().encode(x, x).nbytes;"
        " print(len(set(ThreadPoolExecutor(8).map(work, range(40)))))"
    )
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1"]
