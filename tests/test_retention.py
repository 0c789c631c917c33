"""`max_tokens`: which stored tokens leave, against a plain loop, and what the others become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import CompressionConfig
from nexusquant.compressor import Chunk, compress
from nexusquant.frame import KeyFrame
from nexusquant.retention import WINDOW, attention_received, retain
from nexusquant.stored import Stored
from tests.chunks import body_slots, shared, uneven

FRAME = KeyFrame(None, 0)
EXACT = CompressionConfig(codec="exact", recent=4)
CODED = CompressionConfig(transform="hadamard", tiers=(0.2, 0.3), key_bits=4, value_bits=4)


def chunk(tokens: int = 60, valid: Tensor | None = None) -> Chunk:
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, tokens, 16, generator=generator) for _ in "kv")
    queries = torch.randn(2, 4, tokens, 16, generator=generator)
    return Chunk(keys, values, 0, valid, queries, 0.25)


def voters(count: int = 8) -> Tensor:
    return torch.randn(2, 4, count, 16, generator=torch.Generator().manual_seed(9))


def limit(stored: Stored, tokens: int, queries: Tensor, recent_from: int = 1000) -> Stored:
    return retain(
        stored, tokens, queries, frame=FRAME, scaling=0.25, softcap=None, recent_from=recent_from
    )


def slots(stored: Stored, part: int = 0) -> Tensor:
    tokens = stored.body[part]
    return tokens.slots.positions(tokens.device).expand(2, 2, -1)


def test_attention_received_is_that_of_the_definition() -> None:
    source = chunk()
    stored = compress(EXACT, Stored(), source)
    queries = voters()
    (found,) = attention_received(stored, queries, FRAME, 0.25, 5.0)
    for row in range(2):
        for head in range(2):
            weights = []
            for q in queries[row, 2 * head : 2 * head + 2].flatten(0, 1):
                logits = torch.stack([0.25 * q @ k for k in source.keys[row, head]])
                weights.append((5.0 * torch.tanh(logits / 5.0)).softmax(0))
            torch.testing.assert_close(found[row, head], torch.stack(weights).mean(0)[4:])


def test_the_least_attended_leave_and_sinks_and_recent_stay() -> None:
    stored = compress(EXACT, Stored(), chunk())
    queries = voters()
    (score,) = attention_received(stored, queries, FRAME, 0.25, None)
    less = limit(stored, 24, queries, recent_from=50)
    assert less.count == 24
    assert less.sinks is stored.sinks
    for row in range(2):
        for head in range(2):
            old = score[row, head, :46]  # slots 4 to 49 compete for 24 - 4 sinks - 10 recent
            best = sorted(old.argsort(descending=True)[:10].tolist())
            assert slots(less)[row, head].tolist() == [i + 4 for i in best] + list(range(50, 60))
    again = slots(less)[0, 0]
    torch.testing.assert_close(less.body[0].keys[0, 0], chunk().keys[0, 0, again])


def test_codes_of_the_others_are_untouched_and_tiers_keep_their_shares() -> None:
    stored = compress(CODED, Stored(), chunk(204))
    assert [part.slots.count for part in stored.body] == [40, 60, 100]
    less = limit(stored, 104, voters())
    assert [part.slots.count for part in less.body] == [20, 30, 50]
    for before, after, part in zip(stored.body, less.body, range(3), strict=True):
        where = {}
        for row in range(2):
            for head in range(2):
                where[row, head] = slots(stored, part)[row, head].tolist()
                for i, slot in enumerate(slots(less, part)[row, head].tolist()):
                    old = where[row, head].index(slot)
                    assert torch.equal(after.keys()[row, head, i], before.keys()[row, head, old])
                    assert torch.equal(
                        after.values()[row, head, i], before.values()[row, head, old]
                    )
    rows = sum(part.key_rows.numel() for part in less.body)
    assert rows == sum(part.key_rows.numel() for part in stored.body) // 2


def test_empty_entries_leave_first() -> None:
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, :20] = False
    stored = compress(EXACT, Stored(), chunk(valid=valid))
    less = limit(stored, 40, voters())
    assert (slots(less)[0] >= 0).all()
    assert (slots(less)[1] >= 0).all(), "36 real tokens are left for 36 places"


def test_nothing_happens_below_the_limit() -> None:
    stored = compress(CODED, Stored(), chunk())
    assert limit(stored, stored.count, voters()) is stored


def test_only_the_latest_queries_vote() -> None:
    stored = compress(EXACT, Stored(), chunk())
    late = voters(WINDOW)
    early = 100 * torch.ones(2, 4, 50, 16)
    assert torch.equal(
        slots(limit(stored, 20, late)), slots(limit(stored, 20, torch.cat([early, late], 2)))
    )


@pytest.mark.parametrize("tokens", [13, 20, 40])
@pytest.mark.parametrize("safeguard", [0.3, 1.0])
@pytest.mark.parametrize("codec", ["exact", "e8"])
def test_recent_tokens_stay_in_every_head_whatever_their_tier(
    codec: str, safeguard: float, tokens: int
) -> None:
    settings = shared(codec, head_safeguard=safeguard, max_tokens=tokens)
    valid = torch.arange(300) >= torch.tensor([[0], [90]])
    stored = compress(settings, Stored(), uneven(300, valid=valid))
    queries = torch.randn(2, 6, 8, 32)
    for end in (300, 308, 316):
        stored = limit(stored, tokens, queries, recent_from=end - 8)
        for rows in body_slots(stored, 2, 3):
            assert all(head[-8:] == list(range(end - 8, end)) for head in rows)
        # Where they are in other parts in every head they may take more, until they are older.
        assert end == 300 or stored.count <= tokens
        stored = compress(settings, stored, uneven(8, start=end, queries=None))


@pytest.mark.parametrize("tokens", [0, 36, -1, 40.5])
def test_limits_that_make_no_sense(tokens: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        CompressionConfig(max_tokens=tokens)
