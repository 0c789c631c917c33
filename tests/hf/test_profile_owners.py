"""Whose a profile is: the model's and shared, or one cache's own, which it counts."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import torch

from nexusquant import NexusCache
from nexusquant.hf.profiles import remember_profile
from nexusquant.quantizer import Profiled
from tests.hf.models import feed, prompt, tiny
from tests.hf.profile_views import LONG, bases, tensors
from tests.hf.test_memory import walked_bytes
from tests.hf.together import together


def test_a_cache_made_before_uses_what_was_calibrated_since() -> None:
    model = tiny()
    feed(model, built := NexusCache(model), prompt(LONG), LONG)
    assert built.profile is not None
    cache = NexusCache(model)
    remember_profile(model, built.profile)
    feed(model, cache, prompt(LONG), LONG)
    assert cache.profile is built.profile


def test_what_was_read_before_changes_nothing() -> None:
    """Prompts A, then B give B what B alone gets: in another cache, and in one that was reset."""
    ids, results = prompt(LONG, seed=2), []
    for before in (None, "another", "reset"):
        model = tiny()
        cache = NexusCache(model)
        if before:
            feed(model, cache, prompt(LONG, seed=1), LONG)
        if before == "reset":
            cache.reset()
        else:
            cache = NexusCache(model)
        feed(model, cache, ids, LONG)
        results.append((cache.nbytes, feed(model, cache, prompt(9), 1)))
    for nbytes, logits in results[1:]:
        assert nbytes == results[0][0]
        assert torch.equal(logits, results[0][1])


def test_it_counts_unless_it_is_the_models() -> None:
    model = tiny()
    feed(model, built := NexusCache(model), prompt(LONG), LONG)
    profile = built.profile
    assert profile is not None
    assert profile.nbytes == sum(x.nbytes for x in tensors(profile).values()) > 0
    assert walked_bytes(profile) >= profile.nbytes
    assert built.nbytes == walked_bytes(built) - walked_bytes(profile) + profile.nbytes
    remember_profile(model, replace(profile, source="a calibration"))
    caches = [NexusCache(model), NexusCache(model)]
    for cache in caches:
        feed(model, cache, prompt(LONG), LONG)
        assert cache.nbytes == walked_bytes(cache) - walked_bytes(cache.profile) > 0
    profile = caches[0].profile
    assert caches[1].profile is profile
    twin = copy.deepcopy(caches[0])
    assert twin.profile is profile
    assert twin.nbytes == caches[0].nbytes
    more = [feed(model, cache, prompt(40, seed=2), 40) for cache in (caches[0], twin)]
    torch.testing.assert_close(*more, rtol=0, atol=0)


def test_two_threads_build_each_their_own() -> None:
    model = tiny()

    def work(seed: int, gate: threading.Barrier) -> NexusCache:
        cache = NexusCache(model)
        gate.wait()
        feed(model, cache, prompt(LONG, seed=seed), LONG)
        gate.wait()
        return cache

    caches = together(work, (1, 2))
    for cache in caches:
        assert cache.profile is not None
        assert list(cache.profile.layers) == [0, 1, 2]
        assert bases(cache) == [{Profiled}] * 3
    assert caches[0].profile is not caches[1].profile


def test_a_cache_keeps_the_models_profile_when_reset() -> None:
    model = tiny()
    feed(model, built := NexusCache(model), prompt(LONG), LONG)
    assert built.profile is not None
    remember_profile(model, replace(built.profile, source="a calibration"))
    cache = NexusCache(model)
    feed(model, cache, prompt(LONG), LONG)
    cache.reset()
    assert cache.profile is not None
    feed(model, cache, prompt(40), 40)
    assert bases(cache) == [{Profiled}] * 3


def test_changed_weights_make_another_model() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(LONG), LONG)
    assert cache.profile is not None
    remember_profile(model, cache.profile)
    assert NexusCache(model).profile is cache.profile
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert NexusCache(model).profile is None
