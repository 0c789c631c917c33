"""Attention over stored tokens against a dense float64 reference, one query at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant import attention
from nexusquant.allocation import uniform_layout
from nexusquant.attention import Mask, Partial, attend, merge
from nexusquant.math.rope import KeyFrame, RopeTable, Span
from nexusquant.quantizer import Quantizer
from nexusquant.tokens import CodedTokens, ExactTokens, Slots

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
NO_FRAME = KeyFrame(None, 0)
Part = CodedTokens | ExactTokens


def rope_frame(length: int, dim: int, page: int = 1) -> KeyFrame:
    table = RopeTable(apply_rotary_pos_emb)
    frequencies = 1.0 / 100 ** (torch.arange(dim // 2) / (dim // 2))
    table.extend(0, Span(torch.arange(length)[None].int(), frequencies))
    return KeyFrame(table, page)


def exact_part(index: Tensor, heads: int, dim: int, value_dim: int) -> ExactTokens:
    """Random tokens at slots `index` (batch, heads or 1, n; -1 empty)."""
    batch, _, count = index.shape
    return ExactTokens(
        torch.randn(batch, heads, count, dim),
        torch.randn(batch, heads, count, value_dim),
        Slots.of(index),
    )


def coded_part(
    index: Tensor, heads: int, dim: int, value_dim: int, bits: float = 2.5
) -> CodedTokens:
    batch, _, count = index.shape
    codes, means, quantizers = [], [], []
    for width in (dim, value_dim):
        x = torch.randn(batch, heads, count, width) + torch.randn(heads, 1, width)
        means.append(x.mean(2, keepdim=True).half())
        quantizers.append(Quantizer(uniform_layout(heads, width, bits)))
        codes.append(quantizers[-1].encode(x, means[-1]))
    return CodedTokens(*codes, *means, Slots.of(index), *quantizers)


def dense(part: Part, frame: KeyFrame) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (post-RoPE), values and slots of every entry, (batch, heads, n, ...)."""
    batch, heads = (part.keys.rows if isinstance(part, CodedTokens) else part.keys).shape[:2]
    at = part.slots.positions(CPU).expand(batch, heads, -1)
    if isinstance(part, ExactTokens):
        return part.keys.double(), part.values.double(), at
    keys = frame.leave(part.key_quantizer.decode(part.keys, part.key_mean), at)
    values = part.value_quantizer.decode(part.values, part.value_mean)
    return keys.double(), values.double(), at


def visible(mask: Mask, b: int, head: int, i: int, slot: int) -> float:
    """What is added to the logit of `slot` for query i, one case at a time."""
    hidden = float("-inf")
    column, tensor = slot - mask.first_column, mask.tensor
    if slot < 0 or column < 0:
        return hidden
    if tensor is not None and tensor.ndim == 4:
        if column >= tensor.shape[-1]:
            return hidden
        cell = tensor[b % len(tensor), head if tensor.shape[1] > 1 else 0, i, column]
        if tensor.dtype == torch.bool:
            return 0.0 if bool(cell) else hidden
        return float(cell)
    query = mask.query_slot + i
    if slot > query or (mask.window is not None and slot <= query - mask.window):
        return hidden
    if tensor is not None and (column >= tensor.shape[1] or not bool(tensor[b, column])):
        return hidden
    return 0.0


@dataclass
class Case:
    """Everything `attend` is given."""

    query: Tensor
    parts: list[Part]
    mask: Mask
    frame: KeyFrame = NO_FRAME
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def attend(self) -> Tensor:
        return attend(
            self.query, self.parts, self.mask, frame=self.frame, scaling=self.scaling,
            **self.options,
        )  # fmt: skip

    def reference(self) -> Tensor:
        stored = [dense(part, self.frame) for part in self.parts]
        keys, values, slots = (torch.cat(x, 2) for x in zip(*stored, strict=True))
        batch, query_heads, q_len, _ = self.query.shape
        group = query_heads // keys.shape[1]
        softcap, sinks = self.options.get("softcap"), self.options.get("sink_logits")
        out = torch.zeros(batch, query_heads, q_len, values.shape[-1], dtype=torch.float64)
        for b, head, i in itertools.product(range(batch), range(query_heads), range(q_len)):
            kv = head // group
            logits = keys[b, kv] @ self.query[b, head, i].double() * self.scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            bias = [visible(self.mask, b, head, i, slot) for slot in slots[b, kv].tolist()]
            logits = logits + torch.tensor(bias, dtype=torch.float64)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].double()])
            if not bool((logits > -torch.inf).any()):
                continue
            weights = logits.softmax(0)[: len(bias)]
            out[b, head, i] = weights @ values[b, kv]
        return out

    def check(self) -> None:
        output = self.attend()
        assert output.dtype == self.query.dtype
        expected = self.reference()
        assert output.shape == expected.shape
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=2e-5)


def case(
    *, batch: int = 2, kv_heads: int = 2, group: int = 2, q_len: int = 5, dim: int = 16,
    value_dim: int = 24, mask: Tensor | None = None, first_column: int = 0,
    window: int | None = None, frame: KeyFrame = NO_FRAME, **options: Any,
) -> Case:  # fmt: skip
    """4 sinks, 21 kept tokens of 4..40 per head with empty entries, then an exact tail."""
    sinks = torch.arange(4).expand(batch, 1, 4)
    kept = torch.stack(
        [
            torch.stack([(torch.randperm(37)[:21] + 4).sort().values for _ in range(kv_heads)])
            for _ in range(batch)
        ]
    )
    kept[-1, :, 15:] = -1
    tail = torch.arange(41, 45 + q_len).expand(batch, 1, -1)
    parts: list[Part] = [
        exact_part(sinks, kv_heads, dim, value_dim),
        coded_part(kept, kv_heads, dim, value_dim),
        exact_part(tail, kv_heads, dim, value_dim),
    ]
    query = 2 * torch.randn(batch, kv_heads * group, q_len, dim)
    return Case(query, parts, Mask(mask, 45, first_column, window), frame, options)


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
    monkeypatch.setattr(attention, "_LOGITS", limit)
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
