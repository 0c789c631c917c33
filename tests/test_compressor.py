"""One layer's first chunk to stored tokens: budgets, tiers, padding, sinks and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import Chunk, compress
from nexusquant.errors import NonFiniteError
from nexusquant.math.e8 import HEADROOM
from nexusquant.scorers import SCORERS
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens
from tests.chunks import (
    at_slots,
    body_slots,
    chunk,
    config,
    decoded,
    dense,
    relative_error,
    slots_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("codec", ["e8", "exact"])
@pytest.mark.parametrize("per_head", [True, False])
def test_budget_keeps_sinks_recent_and_the_best(ratio: float, codec: str, per_head: bool) -> None:
    source = chunk()
    stored = compress(config(evict_ratio=ratio, codec=codec, per_head=per_head), Stored(), source)
    assert stored.sinks is not None
    kept = max(round((1 - ratio) * 60), 4 + 8)
    assert stored.count == kept
    assert slots_of(stored.sinks, 2, 2) == [[[0, 1, 2, 3]] * 2] * 2
    scores = -source.keys.norm(dim=-1)
    if not per_head:
        scores = scores.mean(1, keepdim=True).expand(-1, 2, -1)
    for b, heads in enumerate(body_slots(stored, 2, 2)):
        for h, slots in enumerate(heads):
            assert len(slots) == kept - 4
            assert slots[-8:] == list(range(52, 60))
            best = scores[b, h, 4:52].topk(kept - 12).indices + 4
            assert slots[:-8] == sorted(best.tolist())


@pytest.mark.parametrize("tiers", [(), (0.5,), (0.12, 0.34)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("per_head", [True, False])
def test_tiers_hold_the_most_important_tokens_first(
    tiers: tuple[float, ...], ratio: float, per_head: bool
) -> None:
    source = chunk(204)
    settings = config(evict_ratio=ratio, tiers=tiers, per_head=per_head)
    stored = compress(settings, Stored(), source)
    kept = 98 if ratio else 200
    counts = [part.slots.count for part in stored.body]
    bounds = [round(kept * sum(settings.tier_shares[:i])) for i in range(len(tiers) + 2)]
    assert counts == [b - a for a, b in pairwise(bounds)]
    scores = -source.keys.norm(dim=-1)
    if not per_head:
        scores = scores.mean(1, keepdim=True).expand(-1, 2, -1)
    for b, heads in enumerate(body_slots(stored, 2, 2)):
        for h, slots in enumerate(heads):
            ranked = sorted(slots, key=lambda slot: -float(scores[b, h, slot]))
            for i, part in enumerate(stored.body):
                assert slots_of(part, 2, 2)[b][h] == sorted(ranked[bounds[i] : bounds[i + 1]])


def test_better_tiers_are_coded_better_and_the_mean_rate_is_kept() -> None:
    source = chunk(1004, dim=64)
    stored = compress(config(key_bits=3, value_bits=2), Stored(), source)
    errors = [
        [
            relative_error(mine, at_slots(x, part))
            for mine, x in zip(decoded(part), (source.keys, source.values), strict=True)
        ]
        for part in stored.body
    ]
    for better, worse in pairwise(errors):
        assert better[0] < 0.6 * worse[0]
        assert better[1] < 0.6 * worse[1]
    coded = [part for part in stored.body if isinstance(part, CodedTokens)]
    for side, bits in (("key_rows", 3), ("value_rows", 2)):
        spent = sum(8 * getattr(part, side).nbytes for part in coded)
        elements = 2 * 2 * 1000 * 64
        assert bits - 0.1 < spent / elements <= bits


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_fits_the_pipeline(scorer: str) -> None:
    stored = compress(config(evict_ratio=0.5, scorer=scorer), Stored(), chunk())
    assert stored.count == 30


@pytest.mark.parametrize(
    ("bits", "optimal", "wide"), [(2, 0.108, 0.126), (3, 0.030, 0.042), (4, 0.0082, 0.0135)]
)
def test_coded_tokens_are_near_and_sinks_are_exact(bits: int, optimal: float, wide: float) -> None:
    """Levels that suit Gaussians, and those with the headroom that real caches want."""
    source = chunk(300)
    for overload, bound in ((1 / HEADROOM[bits], optimal), (1.0, wide)):
        settings = config(key_bits=bits, value_bits=bits, tiers=(), overload=overload)
        stored = compress(settings, Stored(), source)
        assert stored.sinks is not None
        (body,) = stored.body
        assert isinstance(body, CodedTokens)
        for x, mine, sink in zip(
            (source.keys, source.values), decoded(body), decoded(stored.sinks), strict=True
        ):
            assert torch.equal(sink, x[:, :, :4].half().float())
            assert relative_error(mine, at_slots(x, body)) < bound
        for x in (body.key_centre.mean, body.key_centre.scale):
            assert x is not None
            assert x.shape == (2, 2, 1, 32)
            assert x.dtype == torch.float16


@pytest.mark.parametrize("tiers", [(), (0.12, 0.34)], ids=str)
def test_stored_bytes_add_up(tiers: tuple[float, ...]) -> None:
    source = chunk(1000, dim=64, batch=1)
    stored = compress(config(sinks=4, key_bits=3, value_bits=2, tiers=tiers), Stored(), source)
    sinks = 2 * 2 * 4 * 64 * 2
    centres = 2 * 2 * 2 * 64 * 2  # mean and scale of keys and of values
    gains = 2 * 996
    codes = 996 * 2 * 64 * (3 + 2) // 8
    if not tiers:
        assert storage_bytes(stored) == sinks + centres + gains + codes
        return
    slots = 3 * 2 * 996 / 8  # one bit per slot, head and tier
    total = storage_bytes(stored)
    assert 0.98 * codes < total - (sinks + centres + gains + slots) <= codes + 6
    rows = sum(part.key_rows.nbytes + part.value_rows.nbytes for part in stored.body)
    assert total == sinks + centres + gains + rows + sum(
        part.slots.stored.nbytes for part in stored.body
    )


@pytest.mark.parametrize("codec", ["e8", "exact"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_padding_is_never_stored_whatever_it_holds(codec: str, ratio: float) -> None:
    source = chunk(60, batch=3)
    valid = torch.ones(3, 60, dtype=torch.bool)
    valid[1, :23] = False
    valid[2, :58] = False  # two tokens left: fewer than the sinks
    for x in (source.keys, source.values, source.queries):
        assert x is not None
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    padded = Chunk(source.keys, source.values, 0, valid, source.queries, source.scaling)
    stored = compress(config(codec=codec, evict_ratio=ratio), Stored(), padded)
    assert stored.sinks is not None
    assert [row[0] for row in slots_of(stored.sinks, 3, 2)] == [
        [0, 1, 2, 3], [23, 24, 25, 26], [58, 59],
    ]  # fmt: skip
    body = body_slots(stored, 3, 2)
    counts = [len(row[0]) for row in body]
    assert counts == ([26, max(round(37 / 2), 12) - 4, 0] if ratio else [56, 33, 0])
    assert all(slot >= 27 for row in body[1] for slot in row)
    for part in stored.parts():
        for x in decoded(part):
            assert torch.isfinite(x).all()
    # The padded row is stored as it would be on its own.
    alone = Chunk(
        source.keys[1:2, :, 23:], source.values[1:2, :, 23:], 23, None,
        source.queries[1:2, :, 23:], source.scaling,
    )  # fmt: skip
    single = compress(config(codec=codec, evict_ratio=ratio), Stored(), alone)
    assert [slots_of(part, 1, 2) for part in single.body] == [
        slots_of(part, 3, 2)[1:2] for part in stored.body
    ]
    together, apart = dense(stored, (3, 2, 60), 32), dense(single, (1, 2, 60), 32)
    for mine, theirs in zip(apart, together, strict=True):
        torch.testing.assert_close(mine, theirs[1:2], rtol=1e-5, atol=1e-5, equal_nan=True)


# -- what is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("token", [2, 30])
def test_bad_numbers_are_named_by_layer_and_tokens(bad: float, which: str, token: int) -> None:
    source = chunk(40, start=0, layer_idx=7)
    getattr(source, which)[1, 1, token, 3] = bad
    with pytest.raises(NonFiniteError, match="layer 7, tokens 0 to 39"):
        compress(config(), Stored(), source)


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_numbers_whose_square_overflows_are_refused(size: float, which: str) -> None:
    """Finite as they are, they would make their whole head decode as NaN."""
    source = chunk(40)
    getattr(source, which)[1, 1, 30] = size
    with pytest.raises(NonFiniteError, match="layer 0, tokens 0 to 39"):
        compress(config(), Stored(), source)


def test_bad_scores_are_refused() -> None:
    source = chunk(40, start=100)
    source.keys[0, 0, 9] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 0, tokens 100 to 139: .* scores"):
        compress(config(evict_ratio=0.5), Stored(), source)


def test_bad_numbers_are_refused_by_the_exact_codec_too() -> None:
    source = chunk(40)
    source.values[0, 0, 9, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="infinite values"):
        compress(config(codec="exact"), Stored(), source)


# -- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scorer", SCORERS)
def test_exact_codec_is_bit_identical_in_any_dtype(dtype: torch.dtype, scorer: str) -> None:
    source = chunk()
    assert source.queries is not None
    tensors = [x.to(dtype) for x in (source.keys, source.values, source.queries)]
    source = Chunk(*tensors[:2], 0, queries=tensors[2])
    settings = config(codec="exact", evict_ratio=0.5, scorer=scorer)
    stored = compress(settings, Stored(), source)
    for part in stored.parts():
        assert isinstance(part, ExactTokens)
        assert part.keys.dtype == part.values.dtype == dtype
        assert torch.equal(part.keys, at_slots(source.keys, part))
        assert torch.equal(part.values, at_slots(source.values, part))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float16),
    ],
)
def test_sinks_take_two_bytes_per_element(dtype: torch.dtype, kept: torch.dtype) -> None:
    source = chunk()
    source = Chunk(source.keys.to(dtype), source.values.to(dtype), 0)
    stored = compress(config(), Stored(), source)
    assert stored.sinks is not None
    assert stored.sinks.keys.dtype == stored.sinks.values.dtype == kept


def test_sinks_beyond_fp16_keep_their_precision() -> None:
    source = chunk()
    source.keys[:, :, 0] = 1e5  # attention sinks can be huge
    stored = compress(config(), Stored(), source)
    assert stored.sinks is not None
    assert torch.equal(stored.sinks.keys, source.keys[:, :, :4])


def test_means_beyond_fp16_keep_their_precision() -> None:
    source = chunk()
    huge = Chunk(source.keys + 1e5, source.values, 0)
    (body,) = compress(config(tiers=(), fresh_length=0), Stored(), huge).body
    assert isinstance(body, CodedTokens)
    assert body.key_centre.mean is not None
    assert body.key_centre.mean.dtype == torch.float32
    assert relative_error(decoded(body)[0], at_slots(huge.keys, body)) < 0.13


def test_channels_and_rows_have_scales_of_their_own() -> None:
    """Without a profile, nothing else tells a channel of size 10 from one of size 0.1."""
    source = chunk(300)
    size = torch.logspace(-1, 1, 32)[torch.randperm(32)]
    rows = torch.tensor([1e-3, 1e3]).view(2, 1, 1, 1)
    keys = source.keys * size * rows
    (body,) = compress(config(tiers=()), Stored(), Chunk(keys, source.values, 0)).body
    want = at_slots(keys, body)
    error = (decoded(body)[0] - want).square().mean(2) / want.var(2)
    assert float(error.mean()) < 0.14
    assert float(error[..., size > 0.5 * size.square().mean().sqrt()].max()) < 0.3


def test_without_queries_nothing_is_evicted() -> None:
    stored = compress(config(evict_ratio=0.8), Stored(), chunk(queries=None))
    assert stored.count == 60
