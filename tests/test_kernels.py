"""Operators: their codes against the reference's, how one is chosen, and their threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nexusquant.errors import ConfigError, NonFiniteError
from nexusquant.kernels import _chosen, _made, operator_for, operators, use_operator
from nexusquant.kernels.base import Operator
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, Book
from tests.attention_cases import CPU
from tests.kernel_cases import FAST, layouts, same_but_for_ties

pytestmark = pytest.mark.usefixtures("poisoned_empty")
needs_numba = pytest.mark.skipif(not FAST, reason="tests Numba itself, which is an optional extra")


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
        same_but_for_ties(rows, expected, layout, book)
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


def test_choosing_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operator_for(CPU).name == (FAST[0] if FAST else "reference")
    use_operator("reference")
    assert operator_for(CPU).name == "reference"
    use_operator(None)
    with pytest.raises(ConfigError, match="'fast'; known: triton, numba, reference"):
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


def printed(code: str, **environment: str) -> list[str]:
    """What a fresh interpreter prints, word by word."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.split()


@needs_numba
def test_kernels_leave_the_number_of_threads_alone() -> None:
    """Numba's OpenMP threads are PyTorch's, and so is their number."""
    code = (
        "import torch; from nexusquant import NexusQuantSimple; x = torch.randn(1, 1, 100, 64);"
        " NexusQuantSimple().encode(x, x); print(torch.get_num_threads())"
    )
    assert printed(code, OMP_NUM_THREADS="1") == ["1"]


@needs_numba
def test_many_threads_where_numba_takes_one_caller_at_a_time() -> None:
    """Its own thread pool, for want of OpenMP, ends the process when two threads call at once."""
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor;"
        " from nexusquant import NexusQuantSimple; x = torch.randn(1, 4, 4000, 64);"
        " work = lambda _: NexusQuantSimple().encode(x, x).nbytes;"
        " print(len(set(ThreadPoolExecutor(8).map(work, range(40)))))"
    )
    assert printed(code, NUMBA_THREADING_LAYER="workqueue") == ["1"]


@needs_numba
@pytest.mark.parametrize("book", [Book(), Book("uniform"), Book("companded", 4.0)], ids=str)
def test_bins_hold_one_threshold_at_most(book: Book) -> None:
    """So that one comparison settles what the bin of a number leaves open."""
    from nexusquant.kernels.cpu.code import BINS, STARTS
    from nexusquant.kernels.cpu.tables import code_tables

    starts = torch.from_numpy(code_tables(book)[1:, STARTS : STARTS + 2 * BINS])
    starts = starts.unflatten(1, (2, BINS))
    last = 2.0 ** torch.tensor(BITS)[:, None] - 1
    assert starts.diff(dim=2).max() == 1
    assert (starts[..., 0] == 0).all()
    assert (last - starts[..., -1]).max() <= 1
