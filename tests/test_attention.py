"""Attention over stored tokens against a dense float64 reference, one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexusquant.kernels import reference
from nexusquant.kernels.base import Partial
from nexusquant.kernels.reference import merge
from nexusquant.mask import Mask
from nexusquant.tokens import ExactTokens
from tests.attention_cases import (
    CPU,
    Case,
    Part,
    case,
    coded_part,
    exact_part,
    profiled_part,
    rope_frame,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty", "each_operator")


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (2, 3), (1, 16)])
def test_heads_groups_and_query_lengths(q_len: int, kv_heads: int, group: int) -> None:
    case(kv_heads=kv_heads, group=group, q_len=q_len).check()


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (40, 40), (64, 128), (128, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_head_dims(dim: int, value_dim: int, batch: int) -> None:
    case(batch=batch, dim=dim, value_dim=value_dim, q_len=3).check()


@pytest.mark.parametrize("page", [0, 1, 32])
@pytest.mark.parametrize("q_len", [1, 5])
def test_keys_leave_their_frame(page: int, q_len: int) -> None:
    case(frame=rope_frame(60, 16, page), q_len=q_len).check()


def test_tiers_of_one_layer() -> None:
    """Several coded parts whose slots interleave, each with its own layout and basis."""
    one = case(frame=rope_frame(60, 16, 32))
    kept = one.parts[1].slots.positions(CPU)
    makers = (coded_part, profiled_part, coded_part)
    one.parts[1:2] = [make(kept[..., i::3], 2, 16, 24) for i, make in enumerate(makers)]
    one.check()
    assert one.attend().dtype == torch.float32


def padding(batch: int, columns: int) -> Tensor:
    mask = torch.ones(batch, columns, dtype=torch.bool)
    mask[-1, : columns // 3] = False
    mask[0, columns - 2] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("width", [50, 44, 90])
def test_padding_masks(dtype: torch.dtype, width: int) -> None:
    case(mask=padding(2, width).to(dtype)).check()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("width", [50, 44])
@pytest.mark.parametrize("rows", [1, 2])
def test_full_masks(heads: int, kind: str, width: int, rows: int) -> None:
    seen = torch.rand(rows, heads, 5, width) < 0.7
    seen[..., 2] = True  # a sink that everybody sees
    mask = seen
    if kind == "additive":
        # Not just on and off: ALiBi-like biases are added too.
        mask = torch.randn(seen.shape).masked_fill(~seen, float("-inf"))
    case(mask=mask).check()


def test_lowest_finite_numbers_hide_as_well() -> None:
    """Models fill masks with the dtype's minimum rather than minus infinity."""
    seen = torch.rand(2, 1, 5, 50) < 0.5
    seen[..., 2] = True
    lowest = torch.finfo(torch.float32).min
    one, other = case(mask=seen), case(mask=torch.zeros(seen.shape).masked_fill(~seen, lowest))
    other.parts, other.query = one.parts, one.query
    torch.testing.assert_close(one.attend(), other.attend(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, 3, 30])
@pytest.mark.parametrize("window", [None, 4, 12, 100])
@pytest.mark.parametrize("form", ["none", "padding", "full"])
def test_first_column_and_sliding_window(first: int, window: int | None, form: str) -> None:
    mask = None
    if form == "padding":
        mask = padding(2, 50 - first)
    elif form == "full":
        mask = torch.rand(2, 1, 5, 50 - first) < 0.8
    case(mask=mask, first_column=first, window=window).check()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("q_len", [1, 5])
def test_softcap_and_sink_logits(softcap: float | None, with_sinks: bool, q_len: int) -> None:
    sinks = torch.randn(4) * 3 if with_sinks else None
    case(softcap=softcap, sink_logits=sinks, q_len=q_len).check()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive", "padding"])
def test_rows_that_see_nothing_are_zero(with_sinks: bool, kind: str) -> None:
    seen = torch.rand(2, 1, 5, 50) < 0.5
    seen[0, :, 2] = False
    seen[1] = False
    mask = seen
    if kind == "additive":
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    elif kind == "padding":
        mask = torch.ones(2, 50, dtype=torch.bool)
        mask[1] = False
    one = case(mask=mask, sink_logits=torch.randn(4) if with_sinks else None)
    one.check()
    assert not one.attend()[1].any()
    assert one.attend()[0, :, 0].any()


def test_empty_entries_and_empty_rows() -> None:
    """One head with three tokens, and a batch row without any."""
    one = case()
    index = torch.full((2, 2, 6), -1)
    index[0, 0, :3] = torch.tensor([7, 9, 30])
    part = exact_part(index, 2, 16, 24)
    one.parts = [part, coded_part(index, 2, 16, 24)]
    one.check()
    assert not one.attend()[1].any()


@pytest.mark.parametrize("limit", [1, 5000])
@pytest.mark.parametrize("kind", ["none", "additive"])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, limit: int, kind: str) -> None:
    """150 tokens in blocks of 64, the second wholly hidden from the first query."""
    monkeypatch.setattr(reference, "_LOGITS", limit)
    index = torch.arange(150).view(1, 1, -1).expand(2, 1, -1)
    mask = None
    if kind == "additive":
        mask = torch.zeros(2, 1, 3, 150)
        mask[:, :, 0, 60:140] = float("-inf")
        mask[:, :, 1, :130] = float("-inf")
    parts: list[Part] = [make(index, 2, 16, 16) for make in (exact_part, coded_part)]
    # Logits that grow along the sequence exercise the rescaling of earlier blocks.
    parts[0].keys.mul_(torch.linspace(0.1, 8, 150)[:, None])
    frame = rope_frame(150, 16, 32)
    Case(torch.randn(2, 4, 3, 16), parts, Mask(mask, 148), frame).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    one = case()
    one.query = one.query.to(dtype)
    one.parts = [
        ExactTokens(part.keys.to(dtype), part.values.to(dtype), part.slots)
        if isinstance(part, ExactTokens)
        else part
        for part in one.parts
    ]
    output = one.attend()
    assert output.dtype == dtype
    # Computed in fp32: all that is lost is the final rounding.
    torch.testing.assert_close(output, one.reference().to(dtype), rtol=0.01, atol=1e-3)


def test_large_logits_do_not_overflow() -> None:
    one = case()
    one.query = one.query * 1000
    output = one.attend()
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output.double(), one.reference(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_merging_is_one_softmax(count: int) -> None:
    sizes = [3, 1, 7, 2, 5][:count]
    logits = [4 * torch.randn(2, 2, 3, 4, n) for n in sizes]
    logits[0][0, 0] = float("-inf")  # a part in which some rows see nothing
    values = [torch.randn(2, 2, 3, n, 6) for n in sizes]

    def partial(logit: Tensor, value: Tensor) -> Partial:
        lse = logit.logsumexp(-1, keepdim=True)
        return Partial((logit - lse).exp().nan_to_num(0.0) @ value, lse)

    merged = merge([partial(x, v) for x, v in zip(logits, values, strict=True)])
    whole = partial(torch.cat(logits, -1), torch.cat(values, -2))
    torch.testing.assert_close(merged.output, whole.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-6)
    nested = merge([merge([partial(logits[0], values[0])]), whole])
    assert torch.isfinite(nested.output).all()


def test_the_order_of_parts_does_not_matter() -> None:
    one = case()
    forward = one.attend()
    one.parts.reverse()
    torch.testing.assert_close(one.attend(), forward, rtol=1e-5, atol=1e-6)
