"""Many of everything: threads with settings of their own, blocks in a row, tokens without end."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import CompressionConfig, NexusCache, nexusquant_evict
from tests.hf.models import assert_same_run, feed, generate, prompt, tiny
from tests.hf.situation_cases import CODED, EXACT, HALF
from tests.hf.state import State
from tests.hf.together import together

MOST_SLOW = ["sdpa", pytest.param("eager", marks=pytest.mark.slow)]
EIGHT = [
    EXACT,
    CODED,
    HALF,
    HALF.replace(scorer="snapkv"),
    HALF.replace(scorer="kvzip"),
    HALF.replace(rope_page=1, head_safeguard=0.3),
    CODED.replace(max_tokens=40),
    CODED.replace(key_bits=4, value_bits=4, tiers=()),
]


@pytest.mark.parametrize("attention", MOST_SLOW)
def test_eight_threads_share_a_model(attention: str) -> None:
    model = tiny("llama", attention)

    def turns(settings: CompressionConfig, gate: threading.Barrier) -> list[Any]:
        outputs: list[Any] = []
        with nexusquant_evict(model, settings) as run:
            for length in (60, 1, 33):
                gate.wait()
                outputs.append(generate(model, prompt(length, seed=length), 12))
            past = outputs[0].cache
            ids = torch.cat([outputs[0].sequences, prompt(20)], 1)
            outputs.append(generate(model, ids, 12, cache=past))
            outputs.append(run.stats)
            gate.wait()
        return outputs

    expected = [turns(settings, threading.Barrier(1)) for settings in EIGHT]
    for found, alone in zip(together(turns, EIGHT), expected, strict=True):
        for ours, single in zip(found[:-1], alone[:-1], strict=True):
            assert_same_run(ours, single, 0)
        assert found[-1] == alone[-1]
    assert len({stats[-1].nbytes for stats in expected}) >= 6, "they do differ"


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("attention", MOST_SLOW)
def test_two_hundred_blocks_leave_nothing(attention: str) -> None:
    model = tiny("llama", attention)

    def rounds(count: int) -> None:
        for index in range(count):
            with nexusquant_evict(model, EIGHT[index % 8]):
                if index % 9 == 0:
                    generate(model, prompt(30), 3)
            cache = NexusCache(model, EIGHT[index % 8])
            if index % 9 == 0:
                generate(model, prompt(30), 3, cache=cache)

    rounds(60)  # whatever is kept for the process
    state, tensors, grown = State(model), live_tensors(), []
    for _ in range(4):
        before = sys.getallocatedblocks()
        rounds(40)
        gc.collect()
        grown.append(sys.getallocatedblocks() - before)
    assert live_tensors() == tensors
    assert min(grown) < 40, "a leak would be in all of them: an object per block"
    state.assert_restored()


def test_two_thousand_tokens_in_bounded_memory() -> None:
    model = tiny(num_hidden_layers=1)
    settings = CompressionConfig(residual_length=16, recent=8, max_tokens=64)
    cache, ids, sizes = NexusCache(model, settings), prompt(100), []
    for _ in range(4):  # whole blocks, so that all tails are equally long
        ids = generate(model, ids, 512, cache=cache, do_sample=True).sequences
        stats = cache.stats()
        assert stats.kept_tokens <= 64 + 16
        sizes.append(stats.nbytes - 4 * stats.tokens)  # a position per token remains
    assert stats.tokens == 2147
    assert max(sizes) <= 1.05 * min(sizes)
    assert stats.compression_ratio > 10


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 2048], ids=["all", "bounded"])
def test_twenty_thousand_tokens_do_not_drift(limit: int | None) -> None:
    """KL from the uncompressed model, which reads the same random tokens."""
    model, total = tiny(num_hidden_layers=2), 20_000
    settings = CompressionConfig(max_tokens=limit)
    cache, ids = NexusCache(model, settings, transform="hadamard"), prompt(total)
    exact = feed(model, None, ids, total).log_softmax(-1)
    kl, sizes = [], []
    for begin in range(0, total, 1000):
        logits = feed(model, cache, ids[:, begin : begin + 1000], 1).log_softmax(-1)
        truth = exact[:, begin : begin + 1000]
        kl.append(float((truth.exp() * (truth - logits)).sum(-1).mean()))
        sizes.append(cache.nbytes - 4 * cache.get_seq_length())
    if limit is None:
        assert kl[-1] <= 3 * kl[0]
        assert kl[-1] <= 1.2 * kl[5]
    else:  # in a random model what was dropped counts; it levels off
        assert kl[-1] <= 1.5 * kl[10]
        assert cache.stats().kept_tokens <= limit + 32
        assert max(sizes[4:]) <= 1.3 * min(sizes[4:]), "tails are of any length"
