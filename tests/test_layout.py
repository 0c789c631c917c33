"""Row layouts: where every group's code lies, with rates that differ by head and group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusquant.errors import ConfigError
from nexusquant.layout import RowLayout
from nexusquant.math.e8 import BITS, E8Code

CODES = {bits: E8Code(bits) for bits in BITS}
MIXED = RowLayout(((4, 0, 2, 8, 1), (3, 3, 3, 0, 0), (0, 0, 0, 0, 0), (1, 5, 2, 7, 6)))

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def group_by_group(layout: RowLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and decoded vectors, one group after another."""
    pieces, decoded = [torch.zeros(x.shape[0], x.shape[2], 0, dtype=torch.uint8)], []
    for head, rates in enumerate(layout.rates):
        for group, bits in enumerate(rates):
            part = x[:, head, :, 8 * group : 8 * group + 8]
            if bits:
                pieces.append(CODES[bits].encode(part))
                part = CODES[bits].decode_ref(pieces[-1])
            else:
                part = torch.zeros_like(part)
            decoded.append(part)
    back = torch.cat(decoded, -1).unflatten(-1, (len(layout.rates), -1))
    return torch.cat(pieces, -1).mT, back.transpose(1, 2)


@st.composite
def layouts(draw: st.DrawFn) -> RowLayout:
    heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    head = st.tuples(*[st.sampled_from((0, *BITS))] * groups)
    return RowLayout(tuple(draw(st.lists(head, min_size=heads, max_size=heads))))


@settings(max_examples=80, deadline=None)
@given(layouts(), st.integers(1, 2), st.sampled_from([0, 1, 5]))
def test_rows_are_the_groups_codes_one_after_another(
    layout: RowLayout, batch: int, tokens: int
) -> None:
    x = torch.randn(batch, len(layout.rates), tokens, 8 * len(layout.rates[0]))
    rows, decoded = group_by_group(layout, x)
    data = layout.encode(x, CODES)
    assert (data.dtype, data.shape) == (torch.uint8, (batch, layout.row_bytes, tokens))
    assert torch.equal(data, rows)
    back = layout.decode(data, CODES)
    assert back.dtype == torch.float32
    assert torch.equal(back, decoded)
    assert torch.equal(layout.encode(back, CODES), data)


def test_mixed_rates_on_a_real_shape() -> None:
    x = torch.randn(2, 4, 33, 40)
    rows, decoded = group_by_group(MIXED, x)
    data = MIXED.encode(x, CODES)
    assert torch.equal(data, rows)
    assert torch.equal(MIXED.decode(data, CODES), decoded)
    assert not MIXED.decode(data, CODES)[:, 2].any(), "rate 0 stores nothing"


def test_heads_may_have_any_stride() -> None:
    x, data = torch.randn(2, 33, 4, 40).transpose(1, 2), torch.zeros(2, 100, 33).byte()
    assert torch.equal(MIXED.encode(x, CODES), MIXED.encode(x.contiguous(), CODES))
    part = data[:, 7 : 7 + MIXED.row_bytes]
    part.copy_(MIXED.encode(x, CODES))
    assert torch.equal(MIXED.decode(part, CODES), MIXED.decode(part.contiguous(), CODES))


def test_only_the_codes_in_use_are_needed() -> None:
    layout = RowLayout(((2, 0), (0, 5)))
    some = {2: CODES[2], 5: CODES[5]}
    x = torch.randn(1, 2, 3, 16)
    assert torch.equal(layout.encode(x, some), layout.encode(x, CODES))


def test_sizes() -> None:
    assert (MIXED.heads, MIXED.groups, MIXED.row_bytes) == (4, 5, 45)
    stored = MIXED.stored(torch.device("cpu"))
    assert stored.dtype == torch.bool
    assert stored.tolist() == [[bool(bits) for bits in head] for head in MIXED.rates]


def test_every_byte_knows_its_head() -> None:
    owner = MIXED.head_of_byte(torch.device("cpu"))
    assert owner.tolist() == [0] * 15 + [1] * 9 + [3] * 21
    assert RowLayout(((0,), (0,))).head_of_byte(torch.device("cpu")).tolist() == []


def test_nothing_stored_at_all() -> None:
    layout = RowLayout(((0, 0), (0, 0)))
    data = layout.encode(torch.randn(2, 2, 3, 16), {})
    assert data.shape == (2, 0, 3)
    decoded = layout.decode(data, {})
    assert decoded.shape == (2, 2, 3, 16)
    assert not decoded.any()


def test_a_single_token_decodes_from_odd_offsets() -> None:
    """One vector is contiguous memory, so a 2-bit group may begin at any byte of its storage."""
    layout = RowLayout(((3, 2),))
    x = torch.randn(1, 1, 1, 16)
    rows, decoded = group_by_group(layout, x)
    assert torch.equal(layout.decode(rows, CODES), decoded)


def test_golden_row() -> None:
    """Head after head, group after group: the order in a row is part of the byte format."""
    layout = RowLayout(((3, 2, 0), (2, 1, 4)))
    ramp = torch.tensor([0.34, -0.42, -0.51, 2.32, -0.14, -0.31, 2.64, -1.11])
    x = torch.cat([ramp, ramp.flip(0), ramp]).expand(1, 2, 1, 24)
    assert bytes(layout.encode(x, CODES).flatten().tolist()).hex() == "953c39199393311d78e5673e"


@pytest.mark.parametrize(
    "rates",
    [(), ((2, 2), (2,)), ((9,),), ((-2,),), ((2, 3), (4, 10)), ((2.5,),)],
    ids=str,
)
def test_impossible_rates_are_refused(rates: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="rates"):
        RowLayout(rates)
