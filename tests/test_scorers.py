"""Every scorer against a reference that materialises everything, on odd shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import (
    CompressionConfig,
    ConfigError,
    NexusQuantSimple,
    NonFiniteError,
    register_scorer,
)
from nexusquant.scorers import SCORERS, ScoreInputs, checked_scores, get_scorer
from nexusquant.scorers.expected_attention import ExpectedAttention
from nexusquant.scorers.key_key import KeyKey
from nexusquant.scorers.snapkv import SnapKV
from tests.scorer_references import (
    REFERENCES,
    SHAPES,
    PlainRope,
    identity_rope,
    random_inputs,
    single_rows,
)


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
        def remove(self, queries: Tensor, step: int = 1) -> Tensor:
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
        get_scorer(name)
    assert all(known in str(caught.value) for known in SCORERS)


class Positions:
    """Later tokens are more important."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        return torch.arange(inputs.keys.shape[2]).expand(inputs.keys.shape[:3])


@pytest.mark.usefixtures("own_scorers")
def test_a_registered_scorer_decides() -> None:
    scorer = Positions()
    register_scorer("positions", scorer)
    register_scorer("positions", scorer)
    assert get_scorer("positions") is scorer
    config = CompressionConfig(scorer="positions", evict_ratio=0.5, codec="exact", sinks=0)
    assert CompressionConfig.from_json(config.to_json()) == config
    keys = torch.randn(1, 2, 100, 8)
    codec = NexusQuantSimple(config)
    assert torch.equal(codec.decode(codec.encode(keys, keys))[0][:, :, 50:], keys[:, :, 50:])


@pytest.mark.usefixtures("own_scorers")
@pytest.mark.parametrize(
    ("name", "scorer", "message"),
    [
        ("", Positions(), "'' is no name"),
        (3, Positions(), "3 is no name"),
        ("snapkv", Positions(), "there is a scorer 'snapkv' already"),
        ("mine", Positions, "must be an object with a method score"),
        ("mine", object(), "must be an object with a method score"),
        ("mine", "snapkv", "must be an object with a method score"),
    ],
    ids=("empty", "number", "taken", "class", "object", "text"),
)
def test_what_cannot_be_registered(name: Any, scorer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_scorer(name, scorer)
    with pytest.raises(ConfigError, match="register_scorer adds others"):
        CompressionConfig(scorer="mine")


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_precision_are_taken_whatever_padding_has(dtype: torch.dtype) -> None:
    inputs = random_inputs(padding=[0, 3])
    scores = torch.rand(2, 3, 37).to(dtype)
    scores[1, :, :3] = torch.nan
    checked = checked_scores(scores, inputs, "mine")
    assert checked.dtype == torch.float32
    torch.testing.assert_close(checked, scores.float(), equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_are_counted(bad: float) -> None:
    scores = torch.zeros(2, 3, 37)
    scores[1, 0, 4] = scores[0, 2, 5] = bad
    with pytest.raises(NonFiniteError, match=r"^2 of 222 .*'mine'"):
        checked_scores(scores, random_inputs(padding=[0, 4]), "mine")


@pytest.mark.parametrize(
    ("scores", "given"),
    [
        (None, "NoneType"),
        ([0.0] * 37, "list"),
        (torch.zeros(2, 37), r"torch.float32 \(2, 37\)"),
        (torch.zeros(2, 6, 37), r"torch.float32 \(2, 6, 37\)"),
        (torch.zeros(2, 3, 37, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_what_is_no_scores_is_refused(scores: object, given: str) -> None:
    with pytest.raises(ConfigError, match=rf"scorer 'mine' must .* \(2, 3, 37\), got {given}"):
        checked_scores(scores, random_inputs(), "mine")
