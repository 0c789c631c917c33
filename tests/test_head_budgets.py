"""Heads that share their budget: the selection against plain loops, and parts of some heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import NexusQuantSimple
from nexusquant.accounting import storage_bytes, tensors_in
from nexusquant.budget import Selection, select_tokens, split_heads, split_tiers
from nexusquant.compressor import compress
from nexusquant.errors import ConfigError
from nexusquant.slots import Slots
from nexusquant.stored import Stored
from nexusquant.tokens import CodedTokens, ExactTokens
from tests.chunks import CPU, body_slots, dense, ragged, shared, uneven

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CODECS = ("exact", "e8")


def select(scores: Tensor, valid: Tensor | None, safeguard: float, **changes: Any) -> Selection:
    batch, heads, tokens = scores.shape
    settings = {"evict_ratio": 0.6, "sinks": 2, "recent": 4, "per_head": True, **changes}
    return select_tokens(
        scores, batch=batch, kv_heads=heads, tokens=tokens, valid=valid, device="cpu",
        head_safeguard=safeguard, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("safeguard", [1e-9, 0.2, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("recent", [0, 4, 30])
@pytest.mark.parametrize("levels", [3, 1000])
def test_selection_is_that_of_plain_loops(
    batch: int, safeguard: float, recent: int, levels: int
) -> None:
    """Each head its best, then the best of all; few levels make many ties."""
    heads, tokens, sinks, ratio = 3, 50, 2, 0.6
    scores = torch.randint(levels, (batch, heads, tokens)) / levels
    scores += torch.tensor([0.0, 0.2, 0.4])[:, None]
    valid = torch.arange(tokens) >= 7 * torch.arange(batch)[:, None]
    scores = scores.masked_fill(~valid[:, None], torch.nan)
    found = select(scores, valid, safeguard, recent=recent).kept
    for b in range(batch):
        real = valid[b].nonzero().flatten().tolist()
        rest, last = real[sinks:], set(real[sinks:][len(real[sinks:]) - recent :] if recent else [])
        n_kept = max(round((1 - ratio) * len(real)), min(len(real), sinks + recent)) - sinks
        kept = []
        for h in range(heads):
            ranked = sorted(rest, key=lambda t: (t not in last, -float(scores[b, h, t]), t))
            kept.append(last | set(ranked[: round(safeguard * n_kept)]))
        others = [(t, h) for t in rest for h in range(heads) if t not in kept[h]]
        others.sort(key=lambda x: -float(scores[b, x[1], x[0]]))  # stable
        for t, h in others[: heads * n_kept - sum(map(len, kept))]:
            kept[h].add(t)
        ours = [[t for t in row if t >= 0] for row in found[b].tolist()]
        assert ours == [sorted(x) for x in kept]
        assert sum(map(len, ours)) == heads * n_kept
        if safeguard <= 0.2 and recent < 30:
            assert len({len(x) for x in ours}) > 1


def test_one_head_or_none_apart_has_nothing_to_share() -> None:
    scores = torch.rand(2, 3, 40)
    even = select(scores, None, 1.0, per_head=False)
    assert torch.equal(select(scores, None, 0.2, per_head=False).kept, even.kept)
    assert torch.equal(select(scores[:, :1], None, 0.2).kept, select(scores[:, :1], None, 1.0).kept)
    for wrong in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="head_safeguard"):
            select(scores, None, wrong)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[9, 9, 9]], [(None, 0, 9)]),
        ([[0, 0, 40]], [(None, 0, 0), ((2,), 0, 40)]),
        ([[70, 20, 40]], [(None, 0, 20), ((0, 2), 20, 40), ((0,), 40, 70)]),
        ([[20, 35, 40]], [(None, 0, 20), ((1, 2), 20, 40)]),  # 5 entries of one head: padded
        ([[20, 24, 24]], [(None, 0, 20), ((1, 2), 20, 24)]),  # 8 of two heads
        ([[20, 23, 23]], [(None, 0, 23)]),  # 6 of two heads
        ([[50, 50, 57]], [(None, 0, 57)]),
        ([[60, 10, 30], [10, 12, 55]], [(None, 0, 12), ((0, 2), 12, 60)]),  # the fullest rows
        ([[60, 10, 30], [10, 12, 34]], [(None, 0, 12), ((0, 2), 12, 34), ((0,), 34, 60)]),
    ],
)
def test_parts_are_cut_where_heads_end(counts: list[list[int]], expected: list[Any]) -> None:
    width = max(map(max, counts))
    entries = 3 * torch.arange(width).expand(len(counts), 3, -1)
    entries = torch.where(torch.arange(width) < torch.tensor(counts)[..., None], entries, -1)
    parts = split_heads(entries)
    assert len(parts) == len(expected)
    for (heads, found), (which, begin, end) in zip(parts, expected, strict=True):
        assert heads == which
        assert torch.equal(found, entries[:, list(which or range(3)), begin:end])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_even_heads_are_stored_as_ever(codec: str, ratio: float) -> None:
    """A safeguard of 1: one part per tier, bit for bit what coding the tier at once gives."""
    source = uneven()
    stored = compress(shared(codec, head_safeguard=1.0, evict_ratio=ratio), Stored(), source)
    kept = select(-source.keys.norm(dim=-1), None, 1.0, evict_ratio=ratio, sinks=4, recent=8).kept
    kept = kept.expand(-1, 3, -1)
    tiers = [torch.arange(kept.shape[2]).expand(kept.shape)]
    if codec == "e8":
        tiers = split_tiers(-source.keys.norm(dim=-1), kept, shared().tier_shares)
    assert [part.heads for part in stored.body] == [None] * len(tiers)
    for part, tier in zip(stored.body, tiers, strict=True):
        at = kept.gather(2, tier)
        keys, values = (
            x.gather(2, at[..., None].expand(-1, -1, -1, 32)) for x in (source.keys, source.values)
        )
        if isinstance(part, CodedTokens):
            centres = part.key_centre, part.value_centre
            quantizers = part.key_quantizer, part.value_quantizer
            assert quantizers[0].heads is None
            expected: Any = CodedTokens.encode(keys, values, Slots.of(at), centres, quantizers)
        else:
            expected = ExactTokens(keys, values, Slots.of(at))
        ours, wanted = list(tensors_in(part)), list(tensors_in(expected))
        assert len(ours) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_stored_is_what_was_selected(codec: str, batch: int) -> None:
    source = uneven(300, batch=batch)
    scores = -source.keys.norm(dim=-1)
    settings = shared(codec, key_bits=8, value_bits=8, tiers=(0.4,))
    stored = compress(settings, Stored(), source)
    kept = select(scores, None, 0.3, evict_ratio=0.5, sinks=4, recent=8).kept
    rows = [[[t for t in head if t >= 0] for head in row] for row in kept.tolist()]
    assert body_slots(stored, batch, 3) == rows
    assert stored.count == pytest.approx(150, abs=6)  # padding, and rows that differ
    assert len({len(head) for head in rows[0]}) == 3
    tiers = len(stored.body) - len(ragged(stored))
    assert tiers == (2 if codec == "e8" else 1)
    assert all(part.heads is None for part in stored.body[:tiers])
    keys, values = dense(stored, (batch, 3, 300), 32)
    for ours, x in ((keys, source.keys), (values, source.values)):
        there = ~ours.isnan()
        error = (ours[there] - x[there]).square().mean().sqrt()
        assert float(error) <= (0.02 if codec == "e8" else 0)


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.8])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [0.67, 2])
def test_bytes_stay_what_they_are(ratio: float, codec: str, bits: float) -> None:
    source = uneven(600, heads=4, dim=64, batch=1)
    settings = shared(codec, evict_ratio=ratio, key_bits=bits, value_bits=bits)
    shares = [
        compress(settings.replace(head_safeguard=safeguard), Stored(), source)
        for safeguard in (1.0, 0.2)
    ]
    assert len(ragged(shares[1])) >= 2
    even, ours = map(storage_bytes, shares)
    assert 0.97 * even < ours <= 1.05 * even
    held = [x.numel() * x.element_size() for x in unique(shares[1])]
    assert ours == sum(held), "a view keeps a larger storage alive"


def unique(stored: Stored) -> list[Tensor]:
    return list({id(x): x for x in tensors_in(stored)}.values())


@pytest.mark.parametrize("codec", CODECS)
def test_bare_tensors_come_back_where_they_were(codec: str) -> None:
    """Without sinks, so that some heads have not even the first token."""
    simple = NexusQuantSimple(shared(codec, recent=2, sinks=0, key_bits=8, value_bits=8))
    source = uneven(200)
    packed = simple.encode(source.keys, source.values)
    assert ragged(packed.stored)
    assert any((part.slots.positions(CPU) < 0).any() for part in packed.stored.body)
    kept = simple.kept(packed)
    assert not kept[:, :, 0].all()
    best = select(-source.keys.norm(dim=-1), None, 0.3, evict_ratio=0.5, sinks=0, recent=2).kept
    for b in range(2):
        for h in range(3):
            slots = [t for t in best[b, h].tolist() if t >= 0]
            assert kept[b, h].nonzero().flatten().tolist() == slots
    for back, x in zip(simple.decode(packed), (source.keys, source.values), strict=True):
        assert not back[~kept].any()
        atol = 0.1 if codec == "e8" else 0
        torch.testing.assert_close(back[kept], x[kept], rtol=0, atol=atol)
