"""Scorers once more, materialising everything: short enough to be their definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexusquant.scorers import ScoreInputs
from nexusquant.scorers.expected_attention import ExpectedAttention

EPSILON = ExpectedAttention().epsilon


@dataclass(frozen=True)
class PlainRope:
    """Queries that carry no rotation, moved to the future by a given matrix."""

    matrix: Tensor

    def remove(self, queries: Tensor, step: int = 1) -> Tensor:
        return queries.float()

    def average_rotation(self, count: int) -> Tensor | None:
        return self.matrix


def identity_rope(batch: int, dim: int) -> PlainRope:
    return PlainRope(torch.eye(dim).expand(batch, dim, dim))


def random_inputs(
    *,
    batch: int = 2,
    kv_heads: int = 3,
    group: int = 2,
    tokens: int = 37,
    q_len: int | None = None,
    dim: int = 12,
    padding: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    seed: int = 0,
) -> ScoreInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator)

    # Queries with a bias, as real ones have; value_dim differs from head_dim, as in some models.
    queries = normal(kv_heads * group, tokens if q_len is None else q_len, dim) + 0.5
    keys, values = normal(kv_heads, tokens, dim), normal(kv_heads, tokens, dim + 4)
    valid = None
    if padding is not None:
        valid = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    return ScoreInputs(
        queries.to(dtype),
        keys.to(dtype),
        values.to(dtype),
        valid,
        scaling=dim**-0.5,
        softcap=softcap,
        seed=seed,
    )


SHAPES: list[dict[str, Any]] = [
    {},
    {"batch": 1, "kv_heads": 1, "group": 1, "tokens": 1},
    {"tokens": 203, "group": 3, "dim": 7},
    {"tokens": 150, "q_len": 11},
    {"tokens": 150, "q_len": 90, "padding": [0, 77]},
    {"padding": [5, 0]},
    {"padding": [36, 3], "group": 1},
    {"softcap": 1.5, "padding": [2, 9]},
    {"tokens": 131, "dtype": torch.float16, "padding": [1, 40]},
    {"tokens": 131, "dtype": torch.bfloat16},
]


def single_rows(inputs: ScoreInputs) -> list[tuple[int, ScoreInputs]]:
    """Each row alone, its left padding cut off: `(amount of padding, inputs)`."""
    rows = []
    for b in range(inputs.keys.shape[0]):
        pad = 0 if inputs.valid is None else int((~inputs.valid[b]).sum())
        n = inputs.keys.shape[2] - pad
        rows.append(
            (
                pad,
                replace(
                    inputs,
                    queries=inputs.queries[b : b + 1, :, -min(n, inputs.queries.shape[2]) :],
                    keys=inputs.keys[b : b + 1, :, pad:],
                    values=inputs.values[b : b + 1, :, pad:],
                    valid=None,
                ),
            )
        )
    return rows


def attention_ref(queries: Tensor, keys: Tensor, inputs: ScoreInputs) -> Tensor:
    """Causal attention of one head without padding: `(q, dim)`, `(n, dim)` -> `(q, n)`."""
    logits = queries.double() @ keys.double().T * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    q, n = logits.shape
    hidden = torch.ones(q, n, dtype=torch.bool).triu(n - q + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def snapkv_ref(row: ScoreInputs) -> Tensor:
    _, kv_heads, n, _ = row.keys.shape
    group = row.queries.shape[1] // kv_heads
    votes = torch.zeros(kv_heads, n, dtype=torch.double)
    for h in range(kv_heads * group):
        weights = attention_ref(row.queries[0, h, -64:], row.keys[0, h // group], row)
        votes[h // group] += weights.sum(0) / group
    return torch.stack([votes[:, max(0, t - 2) : t + 3].mean(1) for t in range(n)], 1)


def key_key_ref(row: ScoreInputs) -> Tensor:
    _, kv_heads, n, _ = row.keys.shape
    score = torch.zeros(n, dtype=torch.double)
    for h in range(kv_heads):
        weights = attention_ref(row.keys[0, h], row.keys[0, h], row)
        for t in range(n - 1):
            score[t] += weights[t + 1 :, t].mean()
    return score.expand(kv_heads, n)


def expected_attention_ref(row: ScoreInputs) -> Tensor:
    _, kv_heads, n, dim = row.keys.shape
    group = row.queries.shape[1] // kv_heads
    queries, keys, values = (x[0].double() for x in (row.queries, row.keys, row.values))
    s, sinks = row.scaling, min(row.sinks, n)
    after_sinks = max(0, row.queries.shape[2] - (n - sinks))  # queries at index >= sinks
    seen = queries[:, after_sinks:] if n > sinks else queries
    rotation = torch.eye(dim, dtype=torch.double)
    if row.rope is None:
        seen = seen[:, -512:]
    else:
        average = row.rope.average_rotation(512)
        assert average is not None
        rotation = average[0].double()
    scores = torch.zeros(kv_heads, n, dtype=torch.double)
    for h in range(kv_heads * group):
        mu = rotation @ seen[h].mean(0)
        sigma = rotation @ torch.cov(seen[h].T, correction=0).reshape(dim, dim) @ rotation.T
        k = keys[h // group, sinks:]
        logits = (
            torch.stack([s * x @ mu + 0.5 * s * s * x @ sigma @ x for x in k])
            if n > sinks
            else torch.zeros(0, dtype=torch.double)
        )
        if row.softcap is not None:
            logits = row.softcap * torch.tanh(logits / row.softcap)
        scores[h // group, sinks:] += logits.softmax(0) / group
    scores[:, sinks:] = (scores[:, sinks:] + EPSILON) * values[:, sinks:].norm(dim=-1)
    if n > sinks:
        scores[:, :sinks] = scores[:, sinks:].amax(1, keepdim=True)
    return scores


def key_norm_ref(row: ScoreInputs) -> Tensor:
    return -row.keys[0].double().pow(2).sum(-1).sqrt()


def expected_and_observed_ref(row: ScoreInputs) -> Tensor:
    """Rank by rank sum, worth what that rank is worth to expected attention."""
    _, kv_heads, n, _ = row.keys.shape
    expected, group = expected_attention_ref(row), row.queries.shape[1] // kv_heads
    scores = torch.zeros(kv_heads, n, dtype=torch.double)
    for h in range(kv_heads):
        queries = row.queries[0, h * group : (h + 1) * group, -64:]
        observed = sum(attention_ref(q, row.keys[0, h], row).square().sum(0) for q in queries)
        assert isinstance(observed, Tensor)

        def place(x: Tensor, t: int) -> int:  # of equal ones the earlier is worth more
            return int((x < x[t]).sum() + (x[t + 1 :] == x[t]).sum())

        both = [place(expected[h], t) + place(observed, t) for t in range(n)]
        for t in range(n):
            scores[h, t] = expected[h].sort().values[place(torch.tensor(both), t)]
    return scores


REFERENCES = {
    "expected_and_observed": expected_and_observed_ref,
    "snapkv": snapkv_ref,
    "key_key": key_key_ref,
    "expected_attention": expected_attention_ref,
    "key_norm": key_norm_ref,
}
