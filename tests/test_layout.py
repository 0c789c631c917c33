"""Row layouts: where every group's code lies, with different rates per head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusquant.errors import ConfigError
from nexusquant.layout import RowLayout, Run
from nexusquant.math.e8 import BITS, E8Code

CODES = {bits: E8Code(bits) for bits in BITS}
MIXED = RowLayout(((4, 3, 2, 2, 0), (3, 3, 3, 0, 0), (0, 0, 0, 0, 0), (4, 3, 2, 2, 0)))

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def group_by_group(layout: RowLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and decoded vectors, stated without runs or head sets."""
    batch, heads, tokens, dim = x.shape
    rows = torch.zeros(batch, heads, tokens, layout.row_bytes, dtype=torch.uint8)
    decoded = torch.zeros(batch, heads, tokens, dim)
    for head in range(heads):
        byte = 0
        for group, bits in enumerate(layout.rates[head]):
            if bits:
                where = slice(8 * group, 8 * group + 8)
                data = CODES[bits].encode(x[:, head, :, where])
                rows[:, head, :, byte : byte + bits] = data
                decoded[:, head, :, where] = CODES[bits].decode_ref(data)
                byte += bits
    return rows, decoded


@st.composite
def layouts(draw: st.DrawFn) -> RowLayout:
    heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rate = st.sampled_from((0, *BITS))
    head = st.lists(rate, min_size=groups, max_size=groups).map(
        lambda rates: tuple(sorted(rates, reverse=True))
    )
    return RowLayout(tuple(draw(st.lists(head, min_size=heads, max_size=heads))))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 2), st.sampled_from([0, 1, 5]))
def test_rows_are_the_groups_codes_one_after_another(
    layout: RowLayout, batch: int, tokens: int
) -> None:
    x = torch.randn(batch, len(layout.rates), tokens, 8 * len(layout.rates[0]))
    rows, decoded = group_by_group(layout, x)
    assert torch.equal(layout.encode(x, CODES), rows)
    assert torch.equal(layout.decode(rows, CODES), decoded)
    assert torch.equal(layout.encode(decoded, CODES), rows)


def test_mixed_rates_on_a_real_shape() -> None:
    x = torch.randn(2, 4, 33, 40)
    rows, decoded = group_by_group(MIXED, x)
    data = MIXED.encode(x, CODES)
    assert torch.equal(data, rows)
    assert torch.equal(MIXED.decode(data, CODES), decoded)
    assert not data[:, 1, :, 9:].any(), "bytes that no group uses are zero"
    assert not MIXED.decode(data, CODES)[:, 2].any(), "rate 0 stores nothing"


def test_row_bytes_and_runs() -> None:
    assert MIXED.row_bytes == 11
    assert MIXED.runs(0) == [Run(4, 0, 1, 0, 4), Run(3, 1, 2, 4, 7), Run(2, 2, 4, 7, 11)]
    assert MIXED.runs(1) == [Run(3, 0, 3, 0, 9)]
    assert MIXED.runs(2) == []
    assert [heads for heads, _ in MIXED.head_sets()] == [[0, 3], [1], [2]]
    alike = RowLayout(((3, 2),) * 3)
    assert alike.head_sets() == [(slice(None), alike.runs(0))]


def test_a_single_token_decodes_from_odd_offsets() -> None:
    """One vector is contiguous memory, so a 2-bit group may begin at any byte of its storage."""
    layout = RowLayout(((3, 2),))
    x = torch.randn(1, 1, 1, 16)
    rows, decoded = group_by_group(layout, x)
    assert torch.equal(layout.decode(rows, CODES), decoded)


def test_golden_row() -> None:
    """The order of groups in a row is part of the byte format."""
    layout = RowLayout(((3, 2, 0), (2, 2, 2)))
    ramp = torch.tensor([0.30, -0.44, -0.53, 2.34, -0.17, -0.27, 2.66, -1.10])
    x = torch.cat([ramp, ramp.flip(0), ramp]).expand(1, 2, 1, 24)
    rows = [bytes(row.tolist()).hex() for row in layout.encode(x, CODES)[0, :, 0]]
    assert rows == ["a96b49199300", "933119939331"]


@pytest.mark.parametrize(
    "rates",
    [(), ((2, 2), (2,)), ((1,),), ((5,),), ((-2,),), ((2, 3),), ((2, 0, 2),)],
    ids=str,
)
def test_impossible_rates_are_refused(rates: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="rates"):
        RowLayout(rates)
