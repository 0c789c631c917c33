"""Rotary tables against rotation as complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_pairs
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as apply_once
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_halves

from nexusquant.accounting import storage_bytes
from nexusquant.frame import KeyFrame
from nexusquant.math.rope import ApplyRope, RopeTable, Span, capture, rotate

FREQUENCIES = 1.0 / 100 ** (torch.arange(4) / 4)  # for 8 rotated dimensions


def span(positions: Tensor, tiling: str = "halves", scaling: float = 1.0) -> Span:
    return Span(positions.to(torch.int32), FREQUENCIES, scaling, tiling)


def rotated(x: Tensor, positions: Tensor, tiling: str = "halves", scaling: float = 1.0) -> Tensor:
    """x (..., n, dim) with its first 8 dims rotated at positions (..., n): complex products."""
    head, tail = x[..., :8].double(), x[..., 8:].double()
    if tiling == "pairs":
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head[..., :4], head[..., 4:]
    angle = positions[..., None].double() * FREQUENCIES.double()
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angle, scaling), angle)
    if tiling == "pairs":
        head = torch.view_as_real(turned).flatten(-2)
    else:
        head = torch.cat([turned.real, turned.imag], -1)
    return torch.cat([head, tail], -1).float()


FLAVOURS: dict[str, ApplyRope] = {
    "halves": apply_halves,
    "pairs": apply_pairs,
    "once": apply_once,
}
LEFT_PADDED = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 2]])


@pytest.mark.parametrize("tiling", FLAVOURS)
@pytest.mark.parametrize("dim", [8, 20])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_turning_is_complex_rotation_of_the_leading_dims(
    tiling: str, dim: int, scaling: float
) -> None:
    table = RopeTable(FLAVOURS[tiling])
    table.extend(0, span(LEFT_PADDED * 37, tiling, scaling))
    x, slots = torch.randn(2, 3, 6, dim), torch.arange(6).view(1, 1, 6)
    turned = table.turn(x, slots, table.rows(1), inverse=False)
    expected = rotated(x, LEFT_PADDED[:, None] * 37, tiling, scaling)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)
    back = table.turn(turned, slots, table.rows(1), inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [0, 1, 7, 32])
def test_frames_invert_and_leave_the_rotation_inside_the_page(page: int) -> None:
    positions = torch.stack([torch.arange(90), (torch.arange(90) - 20).clamp(min=0)])
    table = RopeTable(apply_halves)
    table.extend(0, span(positions))
    frame = KeyFrame(table, page)
    # Per-head slots, out of order and with empty entries.
    slots = torch.stack([torch.randperm(90)[:11] for _ in range(6)]).view(2, 3, 11)
    slots[1, 2, -2:] = -1
    at = positions[:, None].expand(-1, 3, -1).gather(2, slots.clamp(min=0))
    plain = torch.randn(2, 3, 11, 12)
    keys = rotated(plain, at)
    entered = frame.enter(keys, slots)
    inside = at if page == 0 else at % page
    torch.testing.assert_close(entered, rotated(plain, inside), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frame.leave(entered, slots), keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frame.remove(keys, slots), plain, rtol=1e-5, atol=1e-5)


def test_without_a_table_keys_stay_and_become_fp32() -> None:
    x, slots = torch.randn(1, 2, 3, 8).half(), torch.zeros(1, 1, 3, dtype=torch.long)
    frame = KeyFrame(None, 1)
    for method in (frame.enter, frame.leave, frame.remove):
        assert torch.equal(method(x, slots), x.float())


def test_half_precision_keys_are_turned_in_fp32() -> None:
    table = RopeTable(apply_halves)
    table.extend(0, span(torch.arange(6)[None]))
    slots = torch.arange(6).view(1, 1, 6)
    keys = torch.randn(1, 1, 6, 8).half()
    back = table.turn(keys, slots, table.rows(1), inverse=True)
    assert back.dtype == torch.float32
    expected = rotated(keys.float(), -torch.arange(6))
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_fit_are_refused() -> None:
    wide = torch.ones(1, 1, 1, 24)
    with pytest.raises(ValueError, match="width 24"):
        rotate(apply_halves, torch.ones(1, 1, 1, 16), wide, wide, inverse=False)


# -- capturing


def cos_sin(positions: Tensor, tiling: str = "halves", scaling: float = 1.0) -> list[Tensor]:
    angle = positions[..., None].float() * FREQUENCIES
    tile: dict[str, Callable[[Tensor], Tensor]] = {
        "halves": lambda x: x.repeat(1, 1, 2),
        "pairs": lambda x: x.repeat_interleave(2, -1),
        "once": lambda x: x,
    }
    return [f(tile[tiling](angle)) * scaling for f in (torch.cos, torch.sin)]


@pytest.mark.parametrize("tiling", FLAVOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_known_frequencies_are_stored_as_positions(tiling: str, dtype: torch.dtype) -> None:
    cos, sin = (x.to(dtype) for x in cos_sin(LEFT_PADDED + 900, tiling, 1.2))
    wrong = (FREQUENCIES * 1.1, 1.2), (FREQUENCIES, 1.0)
    got = capture(cos, sin, LEFT_PADDED + 900, [*wrong, (FREQUENCIES, 1.2)])
    assert got.rows is None
    assert (got.tiling, got.scaling, got.length) == (tiling, 1.2, 6)
    assert torch.equal(got.frequencies, FREQUENCIES)
    for mine, theirs in zip(got.cos_sin(), (cos, sin), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=0, atol=0.01)
    assert storage_bytes(got) < storage_bytes(cos, sin)


def test_unknown_rows_are_copied() -> None:
    cos, sin = cos_sin(LEFT_PADDED)
    for candidates in ([], [(FREQUENCIES * 1.01, 1.0)], [(FREQUENCIES[:3], 1.0)]):
        got = capture(cos, sin, LEFT_PADDED, candidates)
        assert got.rows is not None
        assert torch.equal(got.rows[0], cos)
        assert torch.equal(got.rows[1], sin)
        assert got.rows[0].data_ptr() != cos.data_ptr()


def test_positions_off_by_one_are_noticed() -> None:
    cos, sin = cos_sin(torch.arange(6)[None])
    assert capture(cos, sin, torch.arange(1, 7)[None], [(FREQUENCIES, 1.0)]).rows is not None


def test_equal_batch_rows_are_stored_once() -> None:
    positions = torch.arange(6).expand(4, 6)
    got = capture(*cos_sin(positions), positions, [(FREQUENCIES, 1.0)])
    assert got.positions is not None
    assert got.positions.shape == (1, 6)
    rows = capture(*cos_sin(positions), positions, []).rows
    assert rows is not None
    assert len(rows[0]) == 1


def test_rows_that_differ_survive_positions_that_do_not() -> None:
    """Models may pass no position ids: then the rows alone tell the batch rows apart."""
    cos, sin = cos_sin(LEFT_PADDED)
    got = capture(cos, sin, torch.arange(6)[None], [(FREQUENCIES, 1.0)])
    assert got.rows is not None
    assert torch.equal(got.rows[0], cos)


def test_frequencies_that_change_later_do_not_reach_the_past() -> None:
    """Dynamic NTK and longrope overwrite their buffer when the text grows."""
    live = FREQUENCIES.clone()
    table = RopeTable(apply_halves)
    positions = torch.arange(6)[None]
    table.extend(0, capture(*cos_sin(positions), positions, [(live, 1.0)]))
    live *= 0.5
    torch.testing.assert_close(table.rows(1)[0], cos_sin(positions)[0])


# -- the table as a list of slots


def positions_of(table: RopeTable) -> list[list[float]]:
    """The angle of the first frequency (1 radian per position), per batch row."""
    cos, sin = table.rows(1)
    return (torch.atan2(sin, cos)[..., 0]).tolist()


def test_extend_truncate_and_join() -> None:
    table = RopeTable(apply_halves)
    table.extend(0, span(torch.tensor([[0, 1, 2]])))
    table.extend(3, span(torch.tensor([[3]])))
    assert (table.length, len(table.spans)) == (4, 1)
    assert positions_of(table)[0] == pytest.approx([0, 1, 2, 3 - 0], abs=1e-5)
    table.extend(4, Span(rows=tuple(cos_sin(torch.tensor([[2, 1]])))))
    assert (table.length, len(table.spans)) == (6, 2)
    assert positions_of(table)[0] == pytest.approx([0, 1, 2, 3, 2, 1], abs=1e-5)
    # A rollback: what is known from slot 2 on is replaced.
    table.extend(2, span(torch.tensor([[-1]])))
    assert (table.length, len(table.spans)) == (3, 1)
    assert positions_of(table)[0] == pytest.approx([0, 1, -1], abs=1e-5)
    table.truncate(1)
    assert positions_of(table)[0] == pytest.approx([0], abs=1e-5)
    table.truncate(0)
    assert table.length == 0


def test_spans_that_rotate_differently_stay_apart() -> None:
    one = span(torch.tensor([[0, 1]]))
    faster = Span(torch.tensor([[2]], dtype=torch.int32), FREQUENCIES * 2)
    for other in (
        faster,
        span(torch.tensor([[2]]), scaling=1.5),
        span(torch.tensor([[2]]), "pairs"),
    ):
        assert one.join(other) is None
    table = RopeTable(apply_halves)
    table.extend(0, one)
    table.extend(2, faster)
    assert positions_of(table)[0] == pytest.approx([0, 1, 4 - 2 * torch.pi], abs=1e-5)


def test_stored_rows_join_and_broadcast_over_the_batch() -> None:
    table = RopeTable(apply_halves)
    table.extend(0, Span(rows=tuple(cos_sin(torch.tensor([[0, 1]])))))
    table.extend(2, Span(rows=tuple(cos_sin(torch.tensor([[2], [1]])))))
    assert len(table.spans) == 1
    assert positions_of(table)[0] == pytest.approx([0, 1, 2], abs=1e-5)
    assert positions_of(table)[1] == pytest.approx([0, 1, 1], abs=1e-5)


@pytest.mark.parametrize("stored", ["positions", "rows"])
def test_map_reorders_repeats_and_selects_batch_rows(stored: str) -> None:
    at = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 2, 2]])
    one = span(at) if stored == "positions" else Span(rows=tuple(cos_sin(at)))

    def mapped(fn: Callable[[Tensor], Tensor]) -> list[list[float]]:
        table = RopeTable(apply_halves)
        table.extend(0, one)
        table.map(fn, 3)
        return positions_of(table)

    for pick in ([2, 0, 0], [1], [0, 0, 1, 1, 2, 2]):
        index = torch.tensor(pick)
        got = mapped(lambda t, index=index: t.index_select(0, index))
        torch.testing.assert_close(torch.tensor(got), at[index].float(), rtol=0, atol=1e-5)


def test_a_single_row_serves_any_batch() -> None:
    table = RopeTable(apply_halves)
    table.extend(0, span(torch.tensor([[0, 1, 2]])))
    table.map(lambda t: t.repeat_interleave(3, 0), 1)
    x, slots = torch.randn(3, 2, 3, 8), torch.arange(3).view(1, 1, 3)
    turned = table.turn(x, slots, table.rows(1), inverse=False)
    torch.testing.assert_close(turned, rotated(x, torch.arange(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["positions", "rows"])
def test_a_row_shared_by_the_batch_is_left_alone(stored: str) -> None:
    at = torch.tensor([[0, 1, 2]])
    table = RopeTable(apply_halves)
    table.extend(0, span(at) if stored == "positions" else Span(rows=tuple(cos_sin(at))))
    table.map(lambda t: t.index_select(0, torch.tensor([2, 0])), 3)
    assert positions_of(table)[0] == pytest.approx([0, 1, 2], abs=1e-5)


@pytest.mark.parametrize("tiling", FLAVOURS)
@pytest.mark.parametrize("dim", [8, 20])
def test_average_rotation_is_the_mean_of_rotations(tiling: str, dim: int) -> None:
    table = RopeTable(FLAVOURS[tiling])
    table.extend(0, span(LEFT_PADDED, tiling, 1.2))
    matrix = table.average_rotation(9, dim)
    assert matrix is not None
    assert matrix.shape == (2, dim, dim)
    queries = torch.randn(2, dim)
    for row, last in enumerate((5, 2)):
        ahead = torch.arange(last + 1, last + 10)
        mean = rotated(queries[row].expand(9, dim), ahead, tiling, 1.2).mean(0)
        torch.testing.assert_close(matrix[row] @ queries[row], mean, rtol=1e-4, atol=1e-5)


def test_average_rotation_is_unknown_for_copied_rows() -> None:
    table = RopeTable(apply_halves)
    table.extend(0, Span(rows=tuple(cos_sin(LEFT_PADDED))))
    assert table.average_rotation(4, 8) is None
