"""Decoded tokens by age: more bits while few tokens follow, then the rate of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexusquant.accounting import storage_bytes
from nexusquant.compressor import Chunk, compress
from nexusquant.config import PRESETS, CompressionConfig
from nexusquant.fresh import settled
from nexusquant.plan import Coding, fresh_quantizers
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens
from tests.chunks import CPU, body_slots, chunk, config, dense, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def decoded_behind(
    settings: CompressionConfig, prompt: int, count: int, block: int = 16, **more: Any
) -> tuple[Stored, list[Chunk]]:
    """A prompt, then `count` tokens in blocks of `block`."""
    torch.manual_seed(1)
    chunks = [chunk(prompt, **more)] if prompt else []
    middle = chunks[0].keys.mean(2, keepdim=True) if chunks else 0
    for start in range(prompt, prompt + count, block):
        later = chunk(block, start=start, queries=None, **more)
        later.keys.sub_(later.keys.mean(2, keepdim=True) - middle)
        chunks.append(later)
    stored = Stored()
    for one in chunks:
        stored = compress(settings, stored, one)
    return stored, chunks


def test_decoded_tokens_are_fresh_until_enough_follow() -> None:
    settings = config(fresh_length=48)
    counts = []  # of 48 that may be fresh, more than as many are halved
    for count, newest in ((16, 16), (48, 48), (64, 24), (112, 40)):
        stored, _ = decoded_behind(settings, 100, count)
        assert stored.fresh is not None
        at = stored.fresh.slots.positions(CPU).flatten().tolist()
        assert at == list(range(100 + count - newest, 100 + count))
        counts.append([part.slots.count for part in stored.body])
        for heads in body_slots(stored, 2, 2):
            assert all(row == list(range(4, 100 + count)) for row in heads), "each once, in order"
    assert counts == [[3, 9, middle, 28, 36] for middle in (20, 20, 60, 92)]


def test_fresh_tokens_have_more_bits_and_recoding_costs_little() -> None:
    """Against coding at the final rate at once, on the same tokens."""
    errors = {}
    for name, length in (("fresh", 256), ("settled", 0)):
        settings = config(fresh_length=length, fresh_bits=4)
        stored, chunks = decoded_behind(settings, 200, 256)
        source = (
            torch.cat([one.keys for one in chunks], 2),
            torch.cat([one.values for one in chunks], 2),
        )
        states = {name: stored} | ({"recoded": settled(stored)} if name == "fresh" else {})
        for state, held in states.items():
            back = dense(held, (2, 2, 456), 32)
            errors[state] = sum(
                relative_error(x[:, :, 200:], y[:, :, 200:])
                for x, y in zip(back, source, strict=True)
            )
    assert errors["fresh"] < 0.3 * errors["settled"]
    assert errors["settled"] < errors["recoded"] < 1.3 * errors["settled"]


def test_recoded_tokens_are_as_small_as_those_coded_at_once() -> None:
    sizes = [
        storage_bytes(settled(decoded_behind(config(fresh_length=n), 200, 64)[0])) for n in (0, 64)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("prompt", [0, 100])
def test_a_later_prompt_settles_what_was_fresh(prompt: int) -> None:
    settings = config(fresh_length=64)
    stored, _ = decoded_behind(settings, prompt, 48)
    assert stored.fresh is not None
    turn = compress(settings, stored, chunk(60, start=prompt + 48))
    assert turn.fresh is None
    assert body_slots(turn, 2, 2)[1][1] == list(range(4, prompt + 108))
    again = compress(settings, turn, chunk(16, start=prompt + 108, queries=None))
    assert again.fresh is not None
    assert again.fresh.slots.count == 16


def test_of_many_tokens_only_the_newest_are_fresh() -> None:
    """The others are coded once, at their final rate."""
    settings = config(fresh_length=32)
    stored, _ = decoded_behind(settings, 60, 200, block=100)
    assert stored.fresh is not None
    assert stored.fresh.slots.positions(CPU).flatten().tolist() == list(range(228, 260))
    assert body_slots(stored, 2, 2)[0][0] == list(range(4, 260))


def test_padding_among_fresh_tokens_stays_empty() -> None:
    settings = config(fresh_length=16)
    stored = compress(settings, Stored(), chunk(60))
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 3:9] = False
    for start in (60, 76):
        later = chunk(16, start=start, queries=None, valid=valid)
        stored = compress(settings, stored, later)
    slots = body_slots(stored, 2, 2)
    gone = {start + i for start in (60, 76) for i in range(3, 9)}
    assert slots[0] == [list(range(4, 92))] * 2
    assert slots[1] == [[i for i in range(4, 92) if i not in gone]] * 2


def test_rows_are_rearranged_with_their_fresh_tokens() -> None:
    stored, _ = decoded_behind(config(fresh_length=32), 60, 48)
    turned = stored.map(lambda x: x.flip(0))
    for mine, theirs in zip(*(dense(x, (2, 2, 108), 32) for x in (turned, stored)), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.flip(0).nan_to_num())
    more = compress(config(fresh_length=32), turned, chunk(16, start=108, queries=None))
    assert more.fresh is not None
    assert more.fresh.slots.count == 32, "still in one code space with the body"


def test_fresh_tokens_leave_a_sliding_window() -> None:
    stored, _ = decoded_behind(config(fresh_length=64, sinks=0), 60, 64)
    assert stored.fresh is not None
    rest = stored.drop_before(100)
    assert body_slots(rest, 2, 2)[0][0][-24:] == list(range(100, 124))
    assert rest.fresh is not None
    assert rest.fresh.slots.count == 24
    assert stored.drop_before(124).fresh is None


def test_out_of_reach_of_the_code_a_new_one_begins() -> None:
    """Vectors that are all alike first, others then: what was fresh keeps its code."""
    settings = config(fresh_length=64)
    alike = torch.ones(1, 1, 40, 32) + 1e-6 * torch.randn(1, 1, 40, 32)
    stored = compress(settings, Stored(), Chunk(alike, alike.clone(), 0, None, alike.clone(), 0.2))
    stored = compress(settings, stored, Chunk(alike[:, :, :16], alike[:, :, :16], 40))
    assert stored.fresh is not None
    others = torch.randn(2, 1, 1, 16, 32)
    stored = compress(settings, stored, Chunk(others[0], others[1], 56))
    assert stored.fresh is not None
    assert stored.fresh.slots.count == 16
    assert body_slots(stored, 1, 1) == [[list(range(4, 72))]]
    assert relative_error(stored.fresh.keys(), others[0]) < 0.2


def test_never_fewer_bits_than_the_others() -> None:
    """A tier may already have more bits than the mean and the fresh ones together."""
    settings = config(tiers=(0.01, 0.01), tier_bits=4, key_bits=2, value_bits=2, fresh_bits=0.5)
    stored, _ = decoded_behind(settings, 200, 16)
    coding = Coding.of([part for part in stored.body if isinstance(part, CodedTokens)])
    assert fresh_quantizers(settings, coding) == coding.tiers[1]
    assert body_slots(stored, 2, 2)[0][0] == list(range(4, 216))


def test_few_are_fresh_where_few_are_kept() -> None:
    assert CompressionConfig().most_fresh == CompressionConfig().fresh_length
    assert CompressionConfig(max_tokens=100).most_fresh == 24
    assert CompressionConfig(fresh_bits=0).most_fresh == 0
    assert all(preset.most_fresh > 0 for preset in PRESETS.values())


def test_what_was_just_within_reach_can_be_coded_again() -> None:
    """A first code may make it larger than any gain."""
    settings = config(fresh_length=16, key_bits=1, value_bits=1, transform="hadamard")
    for seed in range(20):
        torch.manual_seed(seed)
        stored = compress(settings, Stored(), chunk(200, batch=1))
        centre = stored.body[0].key_centre
        far = torch.randn(1, 2, 8, 32)
        far *= 127.5 / far.square().mean(-1, keepdim=True).sqrt()
        keys = far * centre.scale.float() + centre.mean.float()
        values = torch.randn(1, 2, 8, 32)
        stored = compress(settings, stored, Chunk(keys, values, 200))
        for start in (208, 216, 224):
            stored = compress(settings, stored, chunk(8, start=start, queries=None, batch=1))
        assert body_slots(stored, 1, 2)[0][0] == list(range(4, 232))


def test_tokens_from_a_slot_on_are_taken_back() -> None:
    """Also where rows were padded, so that a column of entries may be empty."""
    settings = config(fresh_length=64)
    stored = compress(settings, Stored(), chunk(64))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1] = False
    for start in (64, 72, 80):
        now = valid if start == 64 else None
        stored = compress(settings, stored, chunk(8, start=start, queries=None, valid=now))
    for rows in ([0, 1], [1]):
        some = stored.map(lambda x, rows=rows: x[rows])
        back = some.before(84)
        for old, new in zip(
            body_slots(some, len(rows), 2), body_slots(back, len(rows), 2), strict=True
        ):
            assert new == [[slot for slot in head if slot < 84] for head in old]
    assert stored.fresh_from(88) == 64
    assert stored.before(64).fresh is None


def test_nothing_can_be_taken_back_that_settled_in_another_row() -> None:
    settings = config(fresh_length=16)
    stored = compress(settings, Stored(), chunk(64))
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :14] = False  # its 6 tokens stand at the end of the turn
    stored = compress(settings, stored, chunk(20, start=64, queries=None, valid=valid))
    assert stored.fresh is not None
    last = max(int(part.slots.positions(CPU).max()) for part in stored.body if part.slots.count)
    assert last > stored.fresh.slots.start
    assert stored.fresh_from(84) > last
