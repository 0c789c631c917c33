"""A layer's chunk with all that a profile is built from, and its statistics pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant.frame import KeyFrame
from nexusquant.math.rope import RopeTable, Span
from nexusquant.residual import OutputSide
from nexusquant.sampling import Sampling
from nexusquant.statistics import LayerStatistics, layer_statistics

DIM, VALUE_DIM, HIDDEN = 16, 8, 20
EVERYTHING = Sampling(
    queries=10_000, asked=1, keys=10_000, pages=10_000, influence=0.25, attended=0.3
)


def frame_of(page: int, positions: Tensor, scaling: float = 1.0) -> KeyFrame:
    table = RopeTable(apply_rotary_pos_emb)
    frequencies = 1.0 / 50 ** (torch.arange(DIM // 2) / (DIM // 2))
    table.extend(0, Span(positions.int(), frequencies, scaling))
    return KeyFrame(table, page)


@dataclass
class Case:
    keys: Tensor
    values: Tensor
    queries: Tensor
    frame: KeyFrame
    start: int = 0
    valid: Tensor | None = None
    sinks: int = 4
    scaling: float = 0.3
    softcap: float | None = None
    output: OutputSide = field(default_factory=OutputSide)
    sampling: Sampling = EVERYTHING

    def statistics(self) -> LayerStatistics:
        return layer_statistics(**vars(self))

    @property
    def row(self) -> int:
        return 0 if self.valid is None else int(self.valid.sum(-1).argmax())

    @property
    def real(self) -> list[int]:
        if self.valid is None:
            return list(range(self.keys.shape[2]))
        return self.valid[self.row].nonzero().flatten().tolist()

    @property
    def asked(self) -> list[int]:
        """Chunk indices of the queries that count, if there are few enough of them."""
        missing = self.keys.shape[2] - self.queries.shape[2]
        return [i for i in self.real[len(self.real) // 4 :] if i >= missing]

    def at(self, x: Tensor, head: int, index: int) -> Tensor:
        """One vector; x may have only the last tokens."""
        return x[self.row, head, index - self.keys.shape[2]].double()

    def inverse_residual(self, index: int) -> float:
        if self.output.residual is None or self.output.projection is None:
            return 1.0
        row = self.output.residual[self.row, index - self.keys.shape[2]]
        return 1 / float(row.double().square().sum())

    def projection(self, head: int) -> Tensor:
        """(hidden, value_dim) of one query head."""
        if self.output.projection is None:
            return torch.eye(VALUE_DIM).double()
        weight = self.output.projection[:, head * VALUE_DIM : (head + 1) * VALUE_DIM].double()
        return weight * self.channels.sqrt()[:, None]

    @property
    def channels(self) -> Tensor:
        """(hidden,) how much a squared error in each counts."""
        squares = torch.ones(HIDDEN).double()
        if self.output.readers is not None and self.output.complete:
            places = torch.tensor(self.asked) - self.keys.shape[2]
            stream = self.output.residual[self.row, places].double()
            read = [g.double() for g in self.output.readers]
            squares = sum(g**2 / ((g * stream) ** 2).sum(-1).mean() for g in read)
            squares = squares / squares.mean()
        return squares if self.output.behind is None else squares * self.output.behind.double() ** 2

    def leaving(self, index: int) -> Tensor:
        """L with key = L @ key in the frame, (dim, dim), of a chunk index's key."""
        size = 16 if self.frame.page < 16 else 1  # without pages, 16 neighbours share a rotation
        place = self.real.index(index) // size * size
        slot = torch.tensor(self.real[place] + self.start).expand(1, 1, DIM)
        return self.frame.of_row(self.row).leave(torch.eye(DIM)[None, None], slot)[0, 0].mT.double()

    def inside(self, x: Tensor) -> Tensor:
        """(kv_heads, n, dim) of x (batch, kv_heads, tokens, dim) in the frame, sinks left out."""
        slots = torch.tensor(self.real).view(1, 1, -1) + self.start
        one = x[self.row : self.row + 1, :, self.real]
        return self.frame.of_row(self.row).enter(one, slots)[0, :, self.skip :]

    @property
    def skip(self) -> int:
        return self.sinks if self.start == 0 else 0


def case(
    tokens: int = 40, *, kv_heads: int = 2, group: int = 1, page: int = 32, batch: int = 1,
    q_len: int | None = None, project: bool = True, residual: bool = True, yarn: float = 1.0,
    behind: bool = False, readers: int = 0,
    **more: Any,
) -> Case:  # fmt: skip
    """Few enough queries that none is left out."""
    start, valid = more.get("start", 0), more.get("valid")
    positions = torch.arange(start + tokens).expand(batch, -1)
    if valid is not None:
        positions = valid.long().cumsum(-1).sub(1).clamp(min=0)
    heads, q_len = kv_heads * group, q_len or tokens
    keys, values = (
        torch.randn(batch, kv_heads, tokens, DIM),
        torch.randn(batch, 1, tokens, VALUE_DIM),
    )
    values = values.expand(-1, kv_heads, -1, -1) + torch.randn(batch, kv_heads, tokens, VALUE_DIM)
    keys = keys * torch.linspace(2, 0.3, DIM) + torch.randn(kv_heads, 1, DIM)
    queries = torch.randn(batch, heads, q_len, DIM) * torch.logspace(0, -0.7, DIM)
    output = OutputSide(
        torch.randn(HIDDEN, heads * VALUE_DIM) if project else None,
        torch.randn(batch, tokens, HIDDEN) * torch.rand(batch, tokens, 1).exp()
        if residual
        else None,
        torch.rand(HIDDEN) + 0.5 if behind else None,
        torch.rand(readers, HIDDEN) + 0.1 if readers else None,
    )
    return Case(keys, values, queries, frame_of(page, positions, yarn), output=output, **more)


def check(one: Case) -> LayerStatistics:
    """Everything that `layer_statistics` promises, pair by pair."""
    found, asked = one.statistics(), one.asked
    kv_heads, heads = one.keys.shape[1], one.queries.shape[1]
    group, share = heads // kv_heads, one.sampling.influence
    metric = torch.zeros(2, kv_heads, DIM, DIM).double()  # by influence, over all pairs alike
    gram = torch.zeros(kv_heads, VALUE_DIM, VALUE_DIM).double()
    key_weight, value_weight = torch.zeros(2, kv_heads, len(one.real)).double()
    energy, added = 0.0, torch.zeros_like(gram)
    for head in range(heads):
        w = one.projection(head)
        gram[head // group] += w.mT @ w / group
    leaving = {i: one.leaving(i) for i in one.real}
    centre = one.values[one.row][:, one.real[one.skip :]].double().mean(1)
    for head, query in itertools.product(range(heads), asked):
        kv, q = head // group, one.at(one.queries, head, query)
        seen = [i for i in one.real if i <= query]
        logits = torch.stack([one.at(one.keys, kv, i) @ q * one.scaling for i in seen])
        if one.softcap is not None:
            logits = torch.tanh(logits / one.softcap) * one.softcap
        weights = logits.softmax(0)
        values = torch.stack([one.at(one.values, kv, i) for i in seen])
        inverse, attended = one.inverse_residual(query), weights @ values
        energy += float(attended @ gram[kv] @ attended) / len(asked)
        body = range(one.skip, len(seen))
        centred = values[one.skip :] - centre[kv]
        mine = (weights[one.skip :, None] * centred).sum(0)
        added[kv] += torch.outer(mine, mine) * inverse / len(asked)
        for place in body:
            apart = values[place] - attended
            square = float(weights[place]) ** 2 * inverse / len(asked)
            influence = square * float(apart @ gram[kv] @ apart)
            value_weight[kv, place] += square
            key_weight[kv, place] += influence
            turned = leaving[seen[place]].mT @ q
            metric[0, kv] += influence * torch.outer(turned, turned)
            metric[1, kv] += torch.outer(turned, turned) / len(body) / group / len(asked)
    metric[0] /= key_weight.sum(-1)[:, None, None]
    unit = energy / (1 if one.output.behind is None else float(one.channels.sum()))
    if one.output.complete and one.output.behind is None:
        unit = 1.0
    expected = one.scaling**2 * (share * metric[0] + (1 - share) * metric[1])
    close(found.value.metric, gram)
    close(found.value.added, added / unit)
    assert not found.key.added.any()
    close(found.key.metric, expected)
    inverses = sum(one.inverse_residual(i) for i in asked) / len(asked)
    assert float(found.inverse_residual) == pytest.approx(inverses / unit, rel=1e-3)
    values = one.values[one.row][:, one.real[one.skip :]]
    for moments, x, weight in (
        (found.key, one.inside(one.keys), key_weight),
        (found.value, values, value_weight),
    ):
        close(moments.weight, weight.sum(-1) / unit)
        close(moments.mean, x.double().mean(1))
        each = weight[:, one.skip :] / weight.sum(-1, keepdim=True) * one.sampling.attended
        each += (1 - one.sampling.attended) / x.shape[1]
        centred = x.double() - x.double().mean(1, keepdim=True)
        close(moments.covariance, torch.einsum("hn,hni,hnj->hij", each, centred, centred))
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> None:
    """Equal up to a share of the largest entry of every head."""
    scale = b.abs().flatten(1).amax(1) if b.ndim > 1 else b.abs()
    error = (a.double() - b).abs()
    error = error.flatten(1).amax(1) if b.ndim > 1 else error
    assert (error <= tolerance * scale).all(), (error / scale).tolist()
