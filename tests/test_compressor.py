"""One layer's chunk to stored tokens: budgets, padding, sinks, frames, and later chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import Chunk, Stored, compress
from nexusquant.config import CompressionConfig
from nexusquant.errors import NonFiniteError
from nexusquant.math.rope import KeyFrame, RopeTable, Span
from nexusquant.scorers import SCORERS
from nexusquant.tokens import CodedTokens, ExactTokens

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")


def config(**settings: Any) -> CompressionConfig:
    return CompressionConfig(**{"scorer": "key_norm", "recent": 8, "overload": 1.0, **settings})


def chunk(
    tokens: int = 60, *, batch: int = 2, heads: int = 2, dim: int = 32, start: int = 0, **more: Any
) -> Chunk:
    keys = torch.randn(batch, heads, tokens, dim) + 3 * torch.randn(heads, 1, dim)
    values = torch.randn(batch, heads, tokens, dim)
    queries = torch.randn(batch, 2 * heads, tokens, dim)
    return Chunk(keys, values, start, **{"queries": queries, "scaling": dim**-0.5, **more})


def slots_of(part: CodedTokens | ExactTokens, batch: int, heads: int) -> list[list[list[int]]]:
    """Filled slots per batch row and head."""
    at = part.slots.positions(CPU).expand(batch, heads, -1)
    return [[row[row >= 0].tolist() for row in heads] for heads in at]


def decoded(part: CodedTokens | ExactTokens) -> tuple[Tensor, Tensor]:
    if isinstance(part, ExactTokens):
        return part.keys.float(), part.values.float()
    return (
        part.key_quantizer.decode(part.keys, part.key_mean),
        part.value_quantizer.decode(part.values, part.value_mean),
    )


def at_slots(x: Tensor, part: CodedTokens | ExactTokens, start: int = 0) -> Tensor:
    """The source of x (batch, heads, tokens, dim) at every stored entry."""
    index = part.slots.positions(CPU).expand(*x.shape[:2], -1) - start
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean() / (b - b.mean(2, keepdim=True)).square().mean())


@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("codec", ["e8", "exact"])
@pytest.mark.parametrize("per_head", [True, False])
def test_budget_keeps_sinks_recent_and_the_best(ratio: float, codec: str, per_head: bool) -> None:
    source = chunk()
    stored = compress(config(evict_ratio=ratio, codec=codec, per_head=per_head), Stored(), source)
    assert stored.sinks is not None
    assert stored.body is not None
    kept = max(round((1 - ratio) * 60), 4 + 8)
    assert stored.count == kept
    assert slots_of(stored.sinks, 2, 2) == [[[0, 1, 2, 3]] * 2] * 2
    scores = -source.keys.norm(dim=-1)
    if not per_head:
        scores = scores.mean(1, keepdim=True).expand(-1, 2, -1)
    for b, heads in enumerate(slots_of(stored.body, 2, 2)):
        for h, slots in enumerate(heads):
            assert len(slots) == kept - 4
            assert slots[-8:] == list(range(52, 60))
            best = scores[b, h, 4:52].topk(kept - 12).indices + 4
            assert slots[:-8] == sorted(best.tolist())


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_fits_the_pipeline(scorer: str) -> None:
    stored = compress(config(evict_ratio=0.5, scorer=scorer), Stored(), chunk())
    assert stored.count == 30


def test_coded_tokens_are_near_and_sinks_are_exact() -> None:
    source = chunk(300)
    error = []
    for bits in (2, 3, 4):
        stored = compress(config(key_bits=bits, value_bits=bits), Stored(), source)
        assert stored.sinks is not None
        assert isinstance(stored.body, CodedTokens)
        for x, mine, sink in zip(
            (source.keys, source.values), decoded(stored.body), decoded(stored.sinks), strict=True
        ):
            assert torch.equal(sink, x[:, :, :4].half().float())
            error.append(relative_error(mine, at_slots(x, stored.body)))
        assert stored.body.key_mean.shape == (2, 2, 1, 32)
        assert stored.body.key_mean.dtype == torch.float16
    bounds = [0.108] * 2 + [0.030] * 2 + [0.0082] * 2
    assert all(e < bound for e, bound in zip(error, bounds, strict=True)), error


def test_stored_bytes_add_up() -> None:
    source = chunk(1000, dim=64, batch=1)
    stored = compress(config(sinks=4, key_bits=3, value_bits=2), Stored(), source)
    sinks = 2 * 2 * 4 * 64 * 2
    means = 2 * 2 * 64 * 2
    codes = 2 * 996 * (64 * 3 // 8 + 64 * 2 // 8 + 2)
    assert storage_bytes(stored) == sinks + means + codes


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
    assert stored.body is not None
    assert [row[0] for row in slots_of(stored.sinks, 3, 2)] == [
        [0, 1, 2, 3], [23, 24, 25, 26], [58, 59],
    ]  # fmt: skip
    counts = [len(row[0]) for row in slots_of(stored.body, 3, 2)]
    assert counts == ([26, max(round(37 / 2), 12) - 4, 0] if ratio else [56, 33, 0])
    assert all(slot >= 27 for row in slots_of(stored.body, 3, 2)[1] for slot in row)
    for part in stored.parts():
        for x in decoded(part):
            assert torch.isfinite(x).all()
    # The padded row is stored as it would be on its own.
    alone = Chunk(
        source.keys[1:2, :, 23:], source.values[1:2, :, 23:], 23, None,
        source.queries[1:2, :, 23:], source.scaling,
    )  # fmt: skip
    single = compress(config(codec=codec, evict_ratio=ratio), Stored(), alone)
    assert single.body is not None
    assert slots_of(single.body, 1, 2) == slots_of(stored.body, 3, 2)[1:2]
    for mine, theirs in zip(decoded(single.body), decoded(stored.body), strict=True):
        torch.testing.assert_close(mine, theirs[1:2, :, : counts[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("token", [2, 30])
def test_bad_numbers_are_named_by_layer_and_tokens(bad: float, which: str, token: int) -> None:
    source = chunk(40, start=0, layer_idx=7)
    getattr(source, which)[1, 1, token, 3] = bad
    with pytest.raises(NonFiniteError, match="layer 7, tokens 0 to 39"):
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
    stored = compress(config(), Stored(), huge)
    assert isinstance(stored.body, CodedTokens)
    assert stored.body.key_mean.dtype == torch.float32
    error = relative_error(decoded(stored.body)[0], at_slots(huge.keys, stored.body))
    assert error < 0.12


def test_without_queries_nothing_is_evicted() -> None:
    stored = compress(config(evict_ratio=0.8), Stored(), chunk(queries=None))
    assert stored.count == 60


# -- later chunks


@pytest.mark.parametrize("codec", ["e8", "exact"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_later_chunks_are_appended(codec: str, ratio: float) -> None:
    settings = config(codec=codec, evict_ratio=ratio)
    chunks = [chunk(40), chunk(30, start=40), chunk(9, start=70, queries=None)]
    # The text moves on, but later chunks have to be coded around the mean of the first.
    for later in chunks[1:]:
        later.keys.add_(chunks[0].keys.mean(2, keepdim=True) - later.keys.mean(2, keepdim=True))
        later.keys.add_(2.0)
    stored = Stored()
    states = [stored := compress(settings, stored, part) for part in chunks]
    counts = [40, 70, 79] if ratio == 0 else [20, 35, 44]
    assert [state.count for state in states] == counts
    assert stored.sinks is states[0].sinks, "sinks belong to the first chunk only"
    assert stored.body is not None
    before = states[0].body
    assert before is not None
    size = before.slots.count
    for old, new in zip(decoded(before), decoded(stored.body), strict=True):
        assert torch.equal(old, new[:, :, :size]), "what is stored never changes"
    for b, heads in enumerate(slots_of(stored.body, 2, 2)):
        for h, slots in enumerate(heads):
            assert slots[:size] == slots_of(before, 2, 2)[b][h]
            assert slots == sorted(slots)
            assert slots[-9:] == list(range(70, 79))
    keys = torch.cat([part.keys for part in chunks], 2)
    source = at_slots(keys, stored.body)
    if codec == "exact":
        assert torch.equal(decoded(stored.body)[0], source)
    else:
        assert isinstance(stored.body, CodedTokens)
        assert isinstance(before, CodedTokens)
        assert torch.equal(stored.body.key_mean, before.key_mean)
        error = (decoded(stored.body)[0] - source).square().mean(-1)
        energy = (source - before.key_mean).square().mean(-1)
        assert float((error / energy).mean()) < 0.12


def test_a_chunk_of_nothing_but_padding_adds_nothing() -> None:
    first = compress(config(), Stored(), chunk(40))
    valid = torch.zeros(2, 10, dtype=torch.bool)
    assert compress(config(), first, chunk(10, start=40, valid=valid)) == first


def test_map_reorders_batch_rows() -> None:
    source = chunk(40, batch=3)
    stored = compress(config(evict_ratio=0.5), Stored(), source)
    order = torch.tensor([2, 0, 0, 1])
    turned = stored.map(lambda t: t.index_select(0, order))
    for mine, theirs in zip(turned.parts(), stored.parts(), strict=True):
        rows = slots_of(theirs, 3, 2)
        assert slots_of(mine, 4, 2) == [rows[i] for i in order.tolist()]
        for x, y in zip(decoded(mine), decoded(theirs), strict=True):
            assert torch.equal(x, y[order])
    assert list(Stored().map(lambda t: t).parts()) == []


def test_drop_before_frees_old_tokens_in_batches() -> None:
    stored = compress(config(sinks=0), Stored(), chunk(100))
    assert stored.drop_before(31) is stored, "31 tokens are not worth a copy yet"
    rest = stored.drop_before(40)
    assert rest.body is not None
    assert slots_of(rest.body, 2, 2)[0][0] == list(range(40, 100))
    assert storage_bytes(rest) < 0.65 * storage_bytes(stored)
    assert stored.drop_before(100).count == 0
    assert Stored().drop_before(5) == Stored()


# -- frames


@pytest.mark.parametrize("page", [0, 1, 32])
def test_keys_are_coded_in_their_frame(page: int) -> None:
    """Keys alike before RoPE are coded well once it is removed, and badly while it is on."""
    table = RopeTable(apply_rotary_pos_emb)
    frequencies = 1.0 / 100 ** (torch.arange(16) / 16)
    padding = torch.tensor([0, 5])
    positions = (torch.arange(200) - padding[:, None]).clamp(min=0).to(torch.int32)
    table.extend(0, Span(positions, frequencies))
    slots = torch.arange(200).view(1, 1, -1)
    plain = 0.3 * torch.randn(2, 2, 200, 32) + torch.randn(2, 1, 32)
    keys = KeyFrame(table, 1).leave(plain, slots)
    source = Chunk(keys, torch.randn(2, 2, 200, 32), 0, queries=torch.randn(2, 2, 200, 32))
    frame = KeyFrame(table, page)
    for scorer in ("expected_attention", "key_norm"):
        stored = compress(config(evict_ratio=0.25, scorer=scorer), Stored(), source, frame)
        assert isinstance(stored.body, CodedTokens)
        at = stored.body.slots.positions(CPU)
        back = frame.leave(decoded(stored.body)[0], at)
        error = float((back - at_slots(keys, stored.body)).square().mean())
        assert error < {0: 0.12, 1: 0.012, 32: 0.12}[page], error
        if page == 0:
            assert error > 0.05
        assert stored.sinks is not None
        assert torch.equal(stored.sinks.keys, keys[:, :, :4].half()), "sinks keep their RoPE"


def test_expected_attention_looks_at_the_positions_ahead() -> None:
    """With a table the scorer un-rotates the queries, so its ranking changes."""
    table = RopeTable(apply_rotary_pos_emb)
    table.extend(0, Span(torch.arange(60)[None].int(), 1.0 / 100 ** (torch.arange(16) / 16)))
    settings = config(evict_ratio=0.5, scorer="expected_attention")
    source = chunk(60)
    bodies = [compress(settings, Stored(), source, KeyFrame(t, 1)).body for t in (table, None)]
    slots = [slots_of(body, 2, 2) for body in bodies if body is not None]
    assert len(slots) == 2
    assert slots[0] != slots[1]
