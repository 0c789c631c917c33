"""Parts that hold only some heads: attended to, appended, bounded, reordered like all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import compress
from nexusquant.frame import KeyFrame
from nexusquant.mask import Mask
from nexusquant.retention import attention_received, retain
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens
from tests.attention_cases import NO_FRAME, Case, rope_frame
from tests.chunks import CPU, body_slots, dense, ragged, shared, slots_of, uneven

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CODECS = ("exact", "e8")


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("kind", ["none", "padding", "shared", "per_head", "additive"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "sink_logits": True}], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_attention_is_that_over_dense_tokens_with_a_mask_per_head(
    codec: str, options: dict[str, Any], kind: str, q_len: int, group: int
) -> None:
    tokens, heads, frame = 120, 3, rope_frame(140, 32, 32)
    source = uneven(tokens, valid=torch.arange(tokens) >= torch.tensor([[0], [25]]))
    stored = compress(shared(codec, sinks=0), Stored(), source, frame)
    assert ragged(stored)
    mask = None
    if kind == "padding":
        mask = torch.rand(2, tokens + q_len) < 0.8
    elif kind != "none":
        mask = torch.rand(2, 1 if kind == "shared" else heads * group, q_len, tokens + q_len) < 0.7
        if kind == "additive":
            mask = torch.randn(mask.shape).masked_fill(~mask, float("-inf"))
    if options.get("sink_logits"):
        options = {**options, "sink_logits": torch.randn(heads * group)}
    tail = ExactTokens(*torch.randn(2, 2, heads, q_len, 32), Slots(tokens, q_len))
    query = 2 * torch.randn(2, heads * group, q_len, 32)
    ours = Case(query, [*stored.parts(), tail], Mask(mask, tokens), frame, options)
    whole = replace(ours, parts=[evened(stored, heads, tokens, frame), tail], frame=NO_FRAME)
    expected = whole.reference()
    torch.testing.assert_close(ours.attend().double(), expected, rtol=1e-4, atol=2e-5)
    ours.parts.reverse()  # no part is special for coming first
    ours.parts.append(ours.parts.pop(0))
    torch.testing.assert_close(ours.attend().double(), expected, rtol=1e-4, atol=2e-5)


def evened(stored: Stored, heads: int, tokens: int, frame: KeyFrame) -> ExactTokens:
    """Everything decoded, every head at all slots; those that it has not are empty entries."""
    keys, values = torch.zeros(2, 2, heads, tokens, 32)
    there = torch.zeros(2, heads, tokens, dtype=torch.bool)
    for part in stored.parts():
        at = part.slots.positions(CPU).expand(2, part.kv_heads, -1)
        coded = isinstance(part, CodedTokens)
        decoded = (
            (frame.leave(part.keys(), at), part.values()) if coded else (part.keys, part.values)
        )
        for b in range(2):
            for i, head in enumerate(part.heads or range(heads)):
                own = at[b, i] >= 0
                assert not there[b, head, at[b, i, own]].any()
                there[b, head, at[b, i, own]] = True
                for target, x in zip((keys, values), decoded, strict=True):
                    target[b, head, at[b, i, own]] = x[b, i, own].float()
    return ExactTokens(keys, values, Slots.of(torch.where(there, torch.arange(tokens), -1)))


@pytest.mark.parametrize("codec", CODECS)
def test_decoded_tokens_join_the_part_of_all_heads(codec: str) -> None:
    past = compress(shared(codec), Stored(), uneven())
    more = uneven(16, start=120, queries=None)
    stored = compress(shared(codec), past, more)
    assert len(stored.body) == len(past.body)
    slots = body_slots(stored, 2, 3)
    assert all(head[-16:] == list(range(120, 136)) for row in slots for head in row)
    assert stored.count == past.count + 16
    for before, after in zip(past.body, stored.body, strict=True):
        if before.heads is not None:
            assert after is before


@pytest.mark.parametrize("codec", CODECS)
def test_a_second_chunk_continues_parts_of_the_same_heads(codec: str) -> None:
    """Reversed importance makes parts of other heads, the same one makes none."""
    settings = shared(codec, tiers=(0.3,))
    past = compress(settings, Stored(), uneven(400))
    again = compress(settings, past, uneven(400, start=400))
    assert {part.heads for part in again.body} == {part.heads for part in past.body}
    assert len(again.body) == len(past.body)
    assert all(a.continues(b) == (a is b) for a in past.body for b in past.body)
    other = uneven(400, start=400)
    stored = compress(settings, past, replace(other, keys=other.keys.flip(1)))
    assert {part.heads for part in stored.body} > {part.heads for part in past.body}
    assert [part.heads for part in stored.body[: len(past.body)]] == [p.heads for p in past.body]
    for one in (again, stored):
        assert all(
            head[-8:] == list(range(792, 800)) for row in body_slots(one, 2, 3) for head in row
        )
        before, after = (dense(x, (2, 3, 800), 32) for x in (past, one))
        for old, new in zip(before, after, strict=True):
            there = ~old.isnan()
            assert torch.equal(new[there], old[there])
    third = compress(settings, stored, uneven(400, start=800))
    assert third.count == pytest.approx(600, abs=20)
    body_slots(third, 2, 3)  # no slot twice


def test_tiers_that_are_coded_alike_stay_apart() -> None:
    """Parts are matched by their quantizers, which say nothing here."""
    settings = shared(tier_bits=0.0)
    stored = compress(settings, Stored(), uneven(400))
    assert len({part.key_quantizer for part in stored.body}) < len(stored.body)
    again = compress(settings, stored, uneven(400, start=400))
    body_slots(again, 2, 3)
    tiers = [part for part in again.body if part.heads is None]
    assert [t.slots.count for t in tiers] == sorted(t.slots.count for t in tiers)
    assert again.count == pytest.approx(400, abs=12)


def limit(stored: Stored, tokens: int, queries: Tensor, recent_from: int = 1000) -> Stored:
    return retain(
        stored, tokens, queries, frame=NO_FRAME, scaling=0.2, softcap=None, recent_from=recent_from
    )


@pytest.mark.parametrize("codec", CODECS)
def test_attention_received_is_one_softmax_per_head(codec: str) -> None:
    stored = compress(shared(codec), Stored(), uneven())
    queries = torch.randn(2, 6, 5, 32)
    found = attention_received(stored, queries, NO_FRAME, 0.2, 4.0)
    whole = evened(stored, 3, 120, NO_FRAME)
    there = whole.slots.positions(CPU) >= 0
    for b in range(2):
        for h in range(3):
            weights = []
            for q in queries[b, 2 * h : 2 * h + 2].flatten(0, 1):
                logits = 4.0 * torch.tanh(0.2 * (whole.keys[b, h] @ q) / 4.0)
                weights.append(logits.masked_fill(~there[b, h], -torch.inf).softmax(0))
            expected = torch.stack(weights).mean(0)
            for part, score in zip(stored.body, found, strict=True):
                if part.heads is None or h in part.heads:
                    i = h if part.heads is None else part.heads.index(h)
                    at = part.slots.positions(CPU)[b, i]
                    torch.testing.assert_close(score[b, i, at >= 0], expected[at[at >= 0]])
                    assert not score[b, i, at < 0].any()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tokens", [60, 101])
def test_a_limit_shrinks_all_parts_alike_and_keeps_the_best(codec: str, tokens: int) -> None:
    stored = compress(shared(codec), Stored(), uneven(400))
    queries = torch.randn(2, 6, 8, 32)
    scores = attention_received(stored, queries, NO_FRAME, 0.2, None)
    less = limit(stored, tokens, queries)
    assert tokens - 1 < less.count <= tokens
    factor = (tokens - 4) / (stored.count - 4)
    for before, after, score in zip(stored.body, less.body, scores, strict=True):
        assert after.heads == before.heads
        assert after.slots.count == pytest.approx(factor * before.slots.count, abs=1.5)
        heads = list(before.heads or range(3))
        old, new = slots_of(before, 2, 3), slots_of(after, 2, 3)
        for b in range(2):
            for i, h in enumerate(heads):
                real = score[b, i, : len(old[b][h])]
                best = real.argsort(descending=True)[: after.slots.count]
                assert new[b][h] == sorted(old[b][h][j] for j in best.tolist())
    for old_x, new_x in zip(*(dense(x, (2, 3, 400), 32) for x in (stored, less)), strict=True):
        there = ~new_x.isnan()
        torch.testing.assert_close(new_x[there], old_x[there], rtol=0, atol=1e-5)
    assert storage_bytes(less) < 0.8 * storage_bytes(stored)


def made(sizes: dict[tuple[int, ...] | None, range]) -> Stored:
    """Uncoded parts of some of three heads at the given slots, without sinks."""
    return Stored(
        None,
        tuple(
            ExactTokens(
                *torch.randn(2, 1, 3 if heads is None else len(heads), len(slots), 16),
                Slots.of(torch.tensor(slots).view(1, 1, -1)),
                heads,
            )
            for heads, slots in sizes.items()
        ),
    )


def test_recent_tokens_stay_although_some_parts_hold_little_else() -> None:
    """A head goes on in a part of its own, which then has its latest tokens."""
    stored = made({None: range(0, 40), (1,): range(40, 52)})
    less = limit(stored, 20, torch.randn(1, 6, 8, 16), recent_from=44)
    assert slots_of(less.body[1], 1, 3)[0][1][-8:] == list(range(44, 52))
    assert 19 < less.count <= 20


def test_a_limit_is_never_rounded_up() -> None:
    stored = made({None: range(0, 10), (0, 1): range(10, 12)})
    less = limit(stored, 7, torch.randn(1, 6, 8, 16))
    assert [part.slots.count for part in less.body] == [6, 1]  # 6.18 and 1.24


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_reordered_and_repeated_with_their_own_heads(codec: str) -> None:
    valid = torch.arange(300) >= torch.tensor([[0], [90]])
    stored = compress(shared(codec), Stored(), uneven(300, valid=valid))
    before = dense(stored, (2, 3, 300), 32)
    twice = stored.map(lambda x: x.repeat_interleave(2, 0))
    for order in (lambda x: x.flip(0), lambda x: x.repeat_interleave(2, 0), lambda x: x[1:]):
        mapped = stored.map(order)
        after = dense(mapped, (len(order(before[0])), 3, 300), 32)
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, order(old), rtol=0, atol=0, equal_nan=True)
        coded = [part for part in mapped.body if isinstance(part, CodedTokens)]
        assert len({id(part.key_centre.mean) for part in coded}) == bool(coded), "still shared"
    assert storage_bytes(twice) <= 2 * storage_bytes(stored)


@pytest.mark.parametrize("codec", CODECS)
def test_padded_rows_are_stored_as_if_alone(codec: str) -> None:
    source = uneven(300)
    valid = torch.arange(300) >= torch.tensor([[0], [90]])
    both = compress(shared(codec), Stored(), replace(source, valid=valid))
    queries = None if source.queries is None else source.queries[1:, :, 90:]
    row = replace(
        source, keys=source.keys[1:, :, 90:], values=source.values[1:, :, 90:], queries=queries
    )
    alone = dense(compress(shared(codec), Stored(), row), (1, 3, 210), 32)
    for mine, theirs in zip(dense(both, (2, 3, 300), 32), alone, strict=True):
        torch.testing.assert_close(mine[1:, :, 90:], theirs, rtol=0, atol=1e-5, equal_nan=True)
    assert len({len(head) for head in body_slots(both, 2, 3)[1]}) > 1


@pytest.mark.parametrize("codec", CODECS)
def test_parts_out_of_sight_leave(codec: str) -> None:
    """A sliding window over them; every tier keeps a part of all heads for what comes."""
    stored = compress(shared(codec, recent=0, sinks=0), Stored(), uneven(400))
    late = stored.drop_before(350)
    assert late.count < stored.count
    for before, after in zip(body_slots(stored, 2, 3), body_slots(late, 2, 3), strict=True):
        for old, new in zip(before, after, strict=True):
            assert {slot for slot in old if slot >= 350} <= set(new) <= set(old)
    none = stored.drop_before(400)
    assert [part.heads for part in none.body] == [None] * (5 if codec == "e8" else 1)
    assert none.count == 0
    again = compress(shared(codec), none, uneven(100, start=400))
    assert ragged(again)


def test_mask_of_some_heads() -> None:
    mask = Mask(torch.randn(2, 6, 3, 9), 8)
    assert torch.equal(mask.of_heads((0, 2), 3).tensor, mask.tensor[:, [0, 1, 4, 5]])
    for same in (Mask(None, 3), Mask(torch.ones(2, 9), 8), Mask(torch.ones(2, 1, 3, 9), 8)):
        assert same.of_heads((1,), 3) is same
