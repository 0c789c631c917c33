"""Every scorer against a reference that materialises everything, on odd shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.errors import ConfigError
from nexusquant.scorers import SCORERS, ScoreInputs, get_scorer
from nexusquant.scorers.expected_attention import ExpectedAttention
from nexusquant.scorers.key_key import KeyKey
from nexusquant.scorers.snapkv import SnapKV

EPSILON = ExpectedAttention().epsilon


@dataclass(frozen=True)
class PlainRope:
    """Queries that carry no rotation, moved to the future by a given matrix."""

    matrix: Tensor

    def remove(self, queries: Tensor) -> Tensor:
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


REFERENCES = {
    "snapkv": snapkv_ref,
    "key_key": key_key_ref,
    "expected_attention": expected_attention_ref,
    "key_norm": key_norm_ref,
}


def check_against_reference(name: str, inputs: ScoreInputs) -> None:
    scores = get_scorer(name).score(inputs)
    assert scores.shape == inputs.keys.shape[:3]
    assert scores.dtype == torch.float32
    for b, (pad, row) in enumerate(single_rows(inputs)):
        torch.testing.assert_close(
            scores[b, :, pad:].double(), REFERENCES[name](row), rtol=2e-4, atol=1e-6
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_matches_reference(name: str, shape: dict[str, Any]) -> None:
    check_against_reference(name, random_inputs(**shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expected_attention_rotates_statistics(shape: dict[str, Any]) -> None:
    inputs = random_inputs(**shape)
    batch, _, _, dim = inputs.keys.shape
    matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5
    inputs = replace(inputs, rope=PlainRope(matrix.expand(batch, dim, dim)))
    check_against_reference("expected_attention", inputs)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(tokens=150, padding=[0, 20])
    whole = KeyKey(block=1000).score(inputs)
    for block in (1, 7, 149):
        torch.testing.assert_close(KeyKey(block=block).score(inputs), whole)
    whole = ExpectedAttention().score(inputs)
    monkeypatch.setattr("nexusquant.scorers.expected_attention._BLOCK", 13)
    torch.testing.assert_close(ExpectedAttention().score(inputs), whole)


@pytest.mark.parametrize("with_rope", [False, True])
@pytest.mark.parametrize("name", sorted(SCORERS.keys() - {"random"}))
def test_left_padded_row_equals_row_alone(name: str, with_rope: bool) -> None:
    inputs = random_inputs(tokens=90, padding=[0, 41])
    rope = identity_rope(1, inputs.keys.shape[-1]) if with_rope else None
    # Poison: what stands in the padding must not matter, whatever a model left there.
    poison = ~inputs.valid_mask()[:, None, :, None]
    batched = get_scorer(name).score(
        replace(
            inputs,
            queries=inputs.queries.masked_fill(poison, torch.nan),
            keys=inputs.keys.masked_fill(poison, torch.nan),
            values=inputs.values.masked_fill(poison, torch.inf),
            rope=rope,
        )
    )
    for b, (pad, row) in enumerate(single_rows(inputs)):
        alone = get_scorer(name).score(replace(row, rope=rope))
        torch.testing.assert_close(batched[b : b + 1, :, pad:], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_row_of_padding_is_finite(name: str) -> None:
    inputs = random_inputs(tokens=20, padding=[20, 3])
    assert torch.isfinite(get_scorer(name).score(inputs)).all()


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "key_key"])
def test_planted_heavy_hitter_ranks_first(name: str) -> None:
    """A key along the common direction of all queries (and keys) gets everybody's attention."""
    inputs = random_inputs(tokens=300, dim=16, group=3)
    direction = torch.ones(16) / 4
    keys = 0.3 * inputs.keys + direction
    planted = 123
    keys[:, :, planted] = 20 * direction
    inputs = replace(inputs, keys=keys, queries=0.3 * inputs.queries + 2 * direction, sinks=0)
    scores = get_scorer(name).score(inputs)
    if name == "snapkv":  # pooled: the neighbourhood shares the vote
        top = scores.topk(5, -1).indices.sort(-1).values
        expected = torch.arange(planted - 2, planted + 3).expand_as(top)
        assert torch.equal(top, expected)
    else:
        assert (scores.argmax(-1) == planted).all()


def test_expected_attention_is_a_gaussian_expectation() -> None:
    """Normalised E[exp(s q.k)] over drawn queries, without the closed form."""
    inputs = random_inputs(batch=1, kv_heads=1, group=1, tokens=60, dim=4)
    inputs = replace(inputs, rope=identity_rope(1, 4), sinks=0)
    seen = inputs.queries[0, 0].double()
    factor = torch.linalg.cholesky(torch.cov(seen.T, correction=0))
    draws = torch.randn(400_000, 4, generator=torch.Generator().manual_seed(2)).double()
    logits = (seen.mean(0) + draws @ factor.T) @ inputs.keys[0, 0].double().T * inputs.scaling
    expected = logits.exp().mean(0)
    expected = expected / expected.sum()
    score = ExpectedAttention(epsilon=0.0).score(inputs)[0, 0].double()
    weight = score / inputs.values[0, 0].double().norm(dim=-1)
    torch.testing.assert_close(weight, expected, rtol=0.02, atol=0.0)


def test_expected_attention_falls_back_when_the_future_is_unknown() -> None:
    @dataclass(frozen=True)
    class Unknown:
        def remove(self, queries: Tensor) -> Tensor:
            raise AssertionError("queries are used as they are")

        def average_rotation(self, count: int) -> Tensor | None:
            return None

    inputs = random_inputs(tokens=600)
    scores = ExpectedAttention().score(replace(inputs, rope=Unknown()))
    assert torch.equal(scores, ExpectedAttention().score(inputs))
    last = replace(inputs, queries=inputs.queries[:, :, -512:])
    assert torch.equal(scores, ExpectedAttention().score(last))


def test_expected_attention_puts_sinks_on_top() -> None:
    inputs = random_inputs(padding=[0, 6])
    scores = ExpectedAttention().score(inputs)
    for b, start in enumerate((0, 6)):
        row = scores[b, :, start:]
        assert torch.equal(row[:, :4], row[:, 4:].amax(-1, keepdim=True).expand(-1, 4))


def test_snapkv_looks_at_its_window_only() -> None:
    inputs = random_inputs(tokens=200)
    queries = inputs.queries.clone()
    queries[:, :, :-64] = torch.nan
    assert torch.equal(SnapKV().score(replace(inputs, queries=queries)), SnapKV().score(inputs))


def test_random_is_deterministic_and_private() -> None:
    inputs = random_inputs(tokens=1000)
    state = torch.get_rng_state()
    first = get_scorer("random").score(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, get_scorer("random").score(inputs))
    for other in (replace(inputs, seed=1), replace(inputs, layer_idx=1)):
        assert not torch.equal(first, get_scorer("random").score(other))
    assert ((first >= 0.0) & (first < 1.0)).all()
    assert abs(float(first.mean()) - 0.5) < 0.02


@pytest.mark.parametrize("name", ["h2o", "", None, ["snapkv"]])
def test_unknown_scorer_lists_the_known(name: object) -> None:
    with pytest.raises(ConfigError) as caught:
        get_scorer(name)  # type: ignore[arg-type]
    assert all(known in str(caught.value) for known in SCORERS)


@pytest.mark.parametrize(
    "change",
    [
        {"queries": torch.zeros(2, 5, 37, 12)},
        {"queries": torch.zeros(2, 6, 38, 12)},
        {"queries": torch.zeros(2, 6, 37, 11)},
        {"keys": torch.zeros(1, 3, 37, 12)},
        {"values": torch.zeros(2, 3, 36, 12)},
        {"valid": torch.ones(2, 36, dtype=torch.bool)},
        {"valid": torch.ones(2, 37)},
    ],
    ids=lambda change: f"{next(iter(change))} {tuple(next(iter(change.values())).shape)}",
)
def test_shapes_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(random_inputs(), **change)
