"""Stored tokens of every kind, and attention over them stated densely in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant.attention import attend
from nexusquant.frame import KeyFrame
from nexusquant.layout import RowLayout
from nexusquant.mask import Mask
from nexusquant.math.rope import RopeTable, Span
from nexusquant.profile import LayerProfile, Profile, Side
from nexusquant.quantizer import Centre, Orthonormal, Profiled, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens, ExactTokens

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


def layout(heads: int, dim: int) -> RowLayout:
    """Another rate in every group, some of them zero, another order in every head."""
    rates = (3, 1, 0, 5, 2)
    return RowLayout(
        tuple(
            tuple(rates[(group + head) % 5] for group in range(dim // 8)) for head in range(heads)
        )
    )


def coded_part(index: Tensor, heads: int, dim: int, value_dim: int) -> CodedTokens:
    batch, _, count = index.shape
    vectors, centres, quantizers = [], [], []
    for width in (dim, value_dim):
        x = torch.randn(batch, heads, count, width) + torch.randn(heads, 1, width)
        scale = 0.5 + torch.rand(batch, heads, 1, width)
        vectors.append(x * scale)
        centres.append(Centre(x.mean(2, keepdim=True).half(), scale.half()))
        quantizers.append(Quantizer(layout(heads, width), Orthonormal("hadamard", width)))
    return CodedTokens.encode(*vectors, Slots.of(index), tuple(centres), tuple(quantizers))


def profiled_part(index: Tensor, heads: int, dim: int, value_dim: int) -> CodedTokens:
    """A basis per head that is not orthonormal, and means that belong to the profile."""
    sides, quantizers = [], []
    for width in (dim, value_dim):
        forward, mean = torch.randn(heads, width, width), torch.randn(heads, width)
        forward = torch.eye(width) + 0.1 * forward
        groups = torch.ones(heads, width // 8)
        unused = groups, torch.ones(heads), groups
        sides.append(Side(forward, forward.inverse(), 3 * mean, *unused))
    profile = Profile("f", 0, "test", 1, {0: LayerProfile(*sides)}, True)
    for name, width in (("key", dim), ("value", value_dim)):
        quantizers.append(Quantizer(layout(heads, width), Profiled(profile, 0, name)))
    x, y = (torch.randn(len(index), heads, index.shape[2], width) for width in (dim, value_dim))
    return CodedTokens.encode(x, y, Slots.of(index), (Centre(), Centre()), tuple(quantizers))


def dense(part: Part, frame: KeyFrame) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (post-RoPE), values and slots of every entry, (batch, heads, n, ...)."""
    at = part.slots.positions(CPU).expand(part.batch_size, part.kv_heads, -1)
    if isinstance(part, ExactTokens):
        return part.keys.double(), part.values.double(), at
    return frame.leave(part.keys(), at).double(), part.values().double(), at


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
    makers = zip((exact_part, coded_part, exact_part), (sinks, kept, tail), strict=True)
    parts: list[Part] = [make(index, kv_heads, dim, value_dim) for make, index in makers]
    query = 2 * torch.randn(batch, kv_heads * group, q_len, dim)
    return Case(query, parts, Mask(mask, 45, first_column, window), frame, options)
