"""What people do with caches between calls, and the masks and positions they pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import CompressionConfig, NexusCache, UnsupportedError, nexusquant_evict
from tests.hf.models import (
    ATTENTIONS,
    assert_rows_equal_alone,
    assert_same_run,
    feed,
    generate,
    left_padded,
    prompt,
    step_logits,
    tiny,
)
from tests.hf.situation_cases import (
    CODED,
    CODES,
    EXACT,
    FULL_AND_SLIDING,
    HALF,
    SETTINGS,
    close,
    pair,
)

# -- copies


@SETTINGS
@FULL_AND_SLIDING
def test_deep_copies_before_between_and_after_turns(kind: str, settings: Any) -> None:
    model = tiny(kind)
    copies = [NexusCache(model, settings)]
    for turn in range(3):
        outputs = []
        for cache in copies:
            outputs.append(feed(model, cache, prompt(30, seed=turn), 30))
            outputs.append(feed(model, cache, prompt(9, seed=turn), 1))
        for logits in outputs[2:]:
            assert any(torch.equal(logits, other) for other in outputs[:2])
        copies.append(copy.deepcopy(copies[-1]))
        assert len({cache.nbytes for cache in copies}) == 1
    for cache in copies[1:]:  # none of them disturbs another
        feed(model, cache, prompt(40, seed=7), 40)
    feed(model, copies[0], prompt(40, seed=7), 40)
    assert len({cache.nbytes for cache in copies}) == 1


def test_a_shallow_copy_is_the_same_cache_as_in_stock() -> None:
    model = tiny()
    results = []
    for cache in pair(model):
        alias = copy.copy(cache)
        feed(model, cache, prompt(30), 30)
        logits = feed(model, alias, prompt(12, seed=2), 12)
        assert alias.get_seq_length() == cache.get_seq_length() == 42
        del cache
        results.append((logits, feed(model, alias, prompt(12, seed=3), 1)))
    for ours, stock in zip(*results, strict=True):
        close(ours, stock)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
def test_a_copy_of_a_cache_that_a_block_made(inside: bool) -> None:
    model = tiny()
    with nexusquant_evict(model, HALF):
        past = generate(model, prompt(40), 12).cache
        twin = copy.deepcopy(past)
    if not inside:
        twin = copy.deepcopy(past)
    both = [feed(model, cache, prompt(20, seed=3), 20) for cache in (past, twin)]
    assert torch.equal(*both)


# -- cropping


@FULL_AND_SLIDING
def test_the_uncoded_tail_can_be_cropped(kind: str) -> None:
    """As if what was taken back had never been there, also in the codes made later."""
    model = tiny(kind, **({"sliding_window": 100} if kind == "gemma3" else {}))
    settings = CompressionConfig(residual_length=16, recent=4, evict_ratio=0.3)
    cropped, direct = NexusCache(model, settings), NexusCache(model, settings)
    for cache in (cropped, direct):
        feed(model, cache, prompt(40), 40)
    feed(model, cropped, prompt(9, seed=2), 9)
    cropped.crop(-6)
    cropped.crop(42)  # the legacy form: how many stay
    feed(model, direct, prompt(9, seed=2)[:, :2], 2)
    assert cropped.get_seq_length() == direct.get_seq_length() == 42
    for step in (10, 20):
        ids = prompt(20, seed=step)
        close(feed(model, cropped, ids, step), feed(model, direct, ids, step))
    assert cropped.nbytes == direct.nbytes


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_crop_behind_a_full_window_is_right_or_refused(kind: str) -> None:
    """Stock refuses: what left the window cannot come back."""
    model = tiny(kind)
    cache, stock = pair(model, EXACT.replace(residual_length=64))
    for each in (cache, stock):
        feed(model, each, prompt(50), 50)
        feed(model, each, prompt(7, seed=2), 7)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        stock.crop(-5)
    try:
        cache.crop(-5)
    except UnsupportedError:
        return
    truth = feed(model, None, torch.cat([prompt(50), prompt(7, seed=2)[:, :2], prompt(3)], 1), 60)
    close(feed(model, cache, prompt(3), 3), truth[:, -3:])


def test_a_refused_crop_changes_nothing_in_any_layer() -> None:
    """gemma3's windows of 24 tokens are never coded in blocks of 32, its full layer is."""
    model = tiny("gemma3")
    cache = NexusCache(model, CompressionConfig())
    feed(model, cache, prompt(40), 40)
    twin = copy.deepcopy(cache)
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        cache.crop(-3)
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    assert torch.equal(*(feed(model, each, prompt(9), 9) for each in (cache, twin)))


# -- rows


@CODES
@FULL_AND_SLIDING
def test_generate_on_rows_rearranged_by_hand(kind: str, settings: Any) -> None:
    model = tiny(kind)
    ids, mask = left_padded([40, 26])
    cache, direct = NexusCache(model, settings), NexusCache(model, settings)
    order = torch.tensor([1, 0, 1])
    feed(model, cache, ids[:, :-1], 39, mask)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    feed(model, direct, ids[order, :-1], 39, mask[order])
    ours, theirs = (
        generate(model, ids[order], 20, attention_mask=mask[order], cache=each)
        for each in (cache, direct)
    )
    assert_same_run(ours, theirs)
    assert cache.nbytes == direct.nbytes


def test_a_reset_cache_takes_another_batch_and_dtype() -> None:
    model = tiny()
    cache = NexusCache(model, HALF)
    generate(model, prompt(40), 12, cache=cache)
    cache.reset()
    model.to(torch.bfloat16)
    again = generate(model, prompt(30, batch=3), 12, cache=cache)
    assert_same_run(
        again, generate(model, prompt(30, batch=3), 12, cache=NexusCache(model, HALF)), 0
    )


@SETTINGS
def test_a_row_of_one_token_among_padding(settings: CompressionConfig) -> None:
    model = tiny()
    ids, mask = left_padded([40, 1])
    with nexusquant_evict(model, settings):
        two = generate(model, ids, 20, attention_mask=mask)
        three = generate(model, ids[[1, 0, 1]], 20, attention_mask=mask[[1, 0, 1]])
        assert_rows_equal_alone(model, ids[:1], [40], settings, generate(model, ids[:1]))
    close(step_logits(three), step_logits(two)[[1, 0, 1]])
    if settings is EXACT:
        assert_same_run(two, generate(model, ids, 20, attention_mask=mask))


# -- masks and positions


@pytest.mark.parametrize("attention", ATTENTIONS)
@FULL_AND_SLIDING
def test_right_padding_equals_stock_and_rows_alone(kind: str, attention: str) -> None:
    model = tiny(kind, attention, **({"sliding_window": 64} if kind == "gemma3" else {}))
    lengths = torch.tensor([30, 17])
    mask = (torch.arange(30) < lengths[:, None]).long()
    ids, more = prompt(30, batch=2) * mask, prompt(12, batch=2, seed=4)
    mask = torch.cat([mask, mask.new_ones(2, 12)], 1)
    positions = lengths[:, None] + torch.arange(12)

    @torch.no_grad()
    def run(cache: Any) -> Tensor:
        first = model(ids, attention_mask=mask[:, :30], cache=cache).logits
        second = model(more, attention_mask=mask, position_ids=positions, cache=cache)
        return torch.cat([first, second.logits], 1)[mask.bool()]

    cache, stock = pair(model)
    close(run(cache), run(stock))
    for settings in (CODED.replace(scorer="key_norm"), HALF.replace(scorer="key_norm")):
        cache = NexusCache(model, settings)
        got = run(cache).split(mask.sum(-1).tolist())
        for row, length in enumerate(lengths.tolist()):
            alone = NexusCache(model, settings)
            parts = [feed(model, alone, ids[row : row + 1, :length], 30)[0]]
            parts.append(feed(model, alone, more[row : row + 1], 12)[0])
            close(got[row], torch.cat(parts))


@SETTINGS
@FULL_AND_SLIDING
def test_a_mask_given_late_changes_nothing(kind: str, settings: CompressionConfig) -> None:
    model = tiny(kind)
    cache, without = NexusCache(model, settings), NexusCache(model, settings)
    ids = prompt(60)
    for each in (cache, without):
        feed(model, each, ids[:, :30], 30)
    for begin, stop in ((30, 50), (50, 51), (51, 60)):
        mask = torch.ones(1, stop, dtype=torch.long)
        with torch.no_grad():
            ours = model(ids[:, begin:stop], attention_mask=mask, cache=cache).logits
        close(ours, feed(model, without, ids[:, begin:stop], 20), 1e-5)


@FULL_AND_SLIDING
def test_positions_from_seven_on(kind: str) -> None:
    model = tiny(kind)
    shifted = {"position_ids": torch.arange(7, 47)[None]}
    cache, stock = pair(model)
    assert_same_run(
        generate(model, prompt(40), 20, cache=cache, **shifted),
        generate(model, prompt(40), 20, cache=stock, **shifted),
    )
    with torch.no_grad():
        logits = [model(prompt(40), cache=each, **shifted).logits for each in pair(model)]
    close(*logits)
    for settings in (CODED, HALF):  # only distances count where RoPE is undone altogether
        moved, plain = (NexusCache(model, settings, rope_page=1) for _ in range(2))
        for begin, stop in ((0, 30), (30, 50), (50, 60)):
            now, at = prompt(60)[:, begin:stop], torch.arange(begin + 7, stop + 7)[None]
            with torch.no_grad():
                ours = model(now, position_ids=at, cache=moved).logits
            close(ours, feed(model, plain, now, 30), 1e-3)
