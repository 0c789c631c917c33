"""Stored tokens of a layer: further chunks, batch operations, key frames, rows of uneven length."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import Chunk, compress
from nexusquant.errors import NonFiniteError
from nexusquant.frame import KeyFrame
from nexusquant.math.rope import RopeTable, Span
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens
from tests.chunks import CPU, at_slots, body_slots, chunk, config, decoded, dense, slots_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("codec", ["e8", "exact"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("tiers", [(), (0.12, 0.34)], ids=str)
def test_later_chunks_are_appended(codec: str, ratio: float, tiers: tuple[float, ...]) -> None:
    settings = config(codec=codec, evict_ratio=ratio, tiers=tiers)
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
    before, shape = body_slots(states[0], 2, 2), (2, 2, 79)
    for b, heads in enumerate(body_slots(stored, 2, 2)):
        for h, slots in enumerate(heads):
            assert slots[: len(before[b][h])] == before[b][h]
            assert slots[-9:] == list(range(70, 79))
    for old, new in zip(dense(states[0], shape, 32), dense(stored, shape, 32), strict=True):
        there = ~old.isnan()
        torch.testing.assert_close(old[there], new[there], rtol=1e-6, atol=1e-5)
    source = torch.cat([part.keys for part in chunks], 2)
    back = dense(stored, shape, 32)[0]
    there = ~back.isnan()
    if codec == "exact":
        assert torch.equal(back[there], source[there])
        return
    for old, new in zip(states[0].body, stored.body, strict=True):
        assert isinstance(old, CodedTokens)
        assert isinstance(new, CodedTokens)
        for name in ("key_rows", "value_rows"):
            was, now = getattr(old, name), getattr(new, name)
            assert torch.equal(now[:, :, : was.shape[2]], was), "what is stored never changes"
        assert torch.equal(new.gains[:, :, : old.gains.shape[2]], old.gains)
        assert torch.equal(new.key_centre.mean, old.key_centre.mean)
        assert (new.key_quantizer, new.value_quantizer) == (old.key_quantizer, old.value_quantizer)
    mean = stored.body[0].key_centre.mean
    error = (back - source).square().nanmean() / (source - mean)[there].square().mean()
    assert float(error) < (0.22 if tiers else 0.14)


@pytest.mark.parametrize("tiers", [(), (0.3,), (0.12, 0.34)], ids=str)
def test_decoded_tokens_go_to_the_second_tier(tiers: tuple[float, ...]) -> None:
    """Nobody knows how important they will be."""
    settings = config(tiers=tiers, fresh_length=0)
    for past in (compress(settings, Stored(), chunk(40)), Stored()):
        new = compress(settings, past, chunk(9, start=40, queries=None, batch=2))
        grew = [
            part.slots.count - (past.body[i].slots.count if past.body else 0)
            for i, part in enumerate(new.body)
        ]
        place = min(1, len(tiers))
        fresh = 9 if past.body else 5  # the first tokens of a sequence are its sinks
        assert grew == [fresh if i == place else 0 for i in range(len(tiers) + 1)]


def test_a_later_chunk_far_beyond_the_first_is_refused() -> None:
    past = compress(config(), Stored(), chunk(100))
    later = chunk(40, start=100)
    later.values[0, 1, 20] *= 1000
    with pytest.raises(NonFiniteError, match=r"tokens 100 to 139: 1 of .* times as large"):
        compress(config(), past, later)
    assert compress(config(codec="exact"), Stored(), later).count == 40


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
    stored = compress(config(sinks=0, tiers=()), Stored(), chunk(400))
    same = stored.drop_before(31)
    assert same.body[0] is stored.body[0], "31 tokens are not worth a copy yet"
    rest = stored.drop_before(160)
    assert body_slots(rest, 2, 2)[0][0] == list(range(160, 400))
    assert storage_bytes(rest) < 0.65 * storage_bytes(stored)
    assert stored.drop_before(400).count == 0
    assert Stored().drop_before(5) == Stored()


def test_drop_before_works_tier_by_tier() -> None:
    stored = compress(config(sinks=0), Stored(), chunk(400))
    before, shape = dense(stored, (2, 2, 400), 32), (2, 2, 400)
    rest = stored.drop_before(300)
    assert storage_bytes(rest) < 0.5 * storage_bytes(stored)
    for heads in body_slots(rest, 2, 2):
        for slots in heads:
            assert slots[-100:] == list(range(300, 400))
    for old, new in zip(before, dense(rest, shape, 32), strict=True):
        there = ~new.isnan()
        assert torch.equal(old[there], new[there])
    assert stored.drop_before(400).count == 0


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
        settings = config(evict_ratio=0.25, scorer=scorer, tiers=())
        stored = compress(settings, Stored(), source, frame)
        (body,) = stored.body
        assert isinstance(body, CodedTokens)
        at = body.slots.positions(CPU)
        back = frame.leave(decoded(body)[0], at)
        error = float((back - at_slots(keys, body)).square().mean())
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
    slots = [
        body_slots(compress(settings, Stored(), source, KeyFrame(t, 1)), 2, 2)
        for t in (table, None)
    ]
    assert slots[0] != slots[1]


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_short_rows_of_vectors_far_from_zero(offset: float) -> None:
    """Qwen's keys have large biases: an empty entry of a padded row must not count as far away."""
    source = chunk(60)
    valid = torch.arange(60) >= torch.tensor([[0], [23]])
    keys, values = source.keys + offset, source.values - offset
    far, usual = (
        compress(config(tiers=()), Stored(), Chunk(*pair, 0, valid, source.queries))
        for pair in ((keys, values), (source.keys, source.values))
    )
    found, expected = dense(far, (2, 2, 60), 32), dense(usual, (2, 2, 60), 32)
    for mine, theirs, shift in zip(found, expected, (offset, -offset), strict=True):
        error = (mine - (theirs + shift)).nan_to_num()
        assert error.square().mean().sqrt() < 0.6  # of a deviation of 1: other codes at 2 bits
        assert torch.equal(mine.isnan(), theirs.isnan())
