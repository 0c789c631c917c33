"""The first long prompt of a cache builds its profile, which is its own."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import NexusCache, nexusquant_evict
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.profiles import remember_profile
from nexusquant.profile import SIDES, Profile
from nexusquant.quantizer import Orthonormal, Profiled
from nexusquant.statistics import MIN_TOKENS
from nexusquant.tokens import CodedTokens
from tests.hf.models import feed, generate, left_padded, prompt, tiny
from tests.hf.test_memory import walked_bytes
from tests.hf.together import together

LONG = 530


def bases(cache: NexusCache) -> list[set[type]]:
    """Per layer, what its keys and values are coded in."""
    found = []
    for layer in cache.layers:
        parts = [part for part in layer.stored.body if isinstance(part, CodedTokens)]
        quantizers = [q for part in parts for q in (part.key_quantizer, part.value_quantizer)]
        found.append({type(q.basis) for q in quantizers})
    return found


def tensors(profile: Profile) -> dict[str, Tensor]:
    return {
        f"{index}.{side}.{name}": x
        for index, layer in profile.layers.items()
        for side in SIDES
        for name, x in {
            **vars(getattr(layer, side)), "rank_costs": (layer.rank_costs or {})[side == "value"]
        }.items()
    }  # fmt: skip


def assert_equal(a: Profile, b: Profile) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [x.inverse_residual for x in a.layers.values()] == [
        x.inverse_residual for x in b.layers.values()
    ]


def error(model: Any, cache: NexusCache, ids: Tensor) -> float:
    """Mean squared error of the logits of tokens that follow."""
    exact = NexusCache(model, codec="exact", residual_length=10_000)
    logits = []
    for filled in (cache, exact):
        feed(model, filled, ids, ids.shape[1])
        logits.append(feed(model, filled, prompt(100, seed=3), 100))
    return float((logits[0] - logits[1]).square().mean())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_the_first_long_prompt_builds_it_and_another_cache_can_be_given_it(
    kind: str, attention: str
) -> None:
    model = tiny(kind, attention)
    first = NexusCache(model)
    assert first.profile is None
    feed(model, first, prompt(LONG), LONG)
    profile = first.profile
    assert profile is not None
    assert profile.complete
    assert list(profile.layers) == [0, 1, 2]
    assert (profile.tokens, profile.rope_page) == (LONG, 32)
    assert profile.fingerprint == fingerprint(model)
    assert bases(first) == [{Profiled}] * 3, "already the prompt that built it is coded with it"
    assert NexusCache(model).profile is None, "it is nobody else's"
    remember_profile(model, profile)
    second = NexusCache(model)
    assert second.profile is profile
    feed(model, second, prompt(60, seed=5), 60)
    assert bases(second) == [{Profiled}] * 3, "a short prompt can use it"
    assert NexusCache(model, "max").profile is profile, "whatever the preset"
    assert NexusCache(model, rope_page=8).profile is None, "in its key frame only"
    assert list(profile.layers) == [0, 1, 2]


def test_a_profile_pays() -> None:
    """Correlated channels: at equal bits, the transform of the profile errs less than Hadamard."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                weight.view(2, 16, -1)[:, 4:] *= 0.2
    settings = {"key_bits": 2, "value_bits": 2, "tiers": ()}
    plain = error(
        model, NexusCache(model, "lossless", transform="hadamard", **settings), prompt(600)
    )
    coded = error(model, NexusCache(model, "lossless", **settings), prompt(600))
    assert coded < 0.9 * plain


def test_shorter_prompts_stay_with_hadamard_and_build_nothing() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(MIN_TOKENS - 1), MIN_TOKENS - 1)
    assert cache.profile is None
    assert bases(cache) == [{Orthonormal}] * 3
    feed(model, cache, prompt(LONG), LONG)
    assert bases(cache) == [{Orthonormal}] * 3, "what was begun goes on"
    assert cache.profile is None, "nothing would use it"


def test_a_turn_much_shorter_than_its_past_builds_nothing() -> None:
    model = tiny()
    cache = NexusCache(model)
    for size in (400, 400, MIN_TOKENS):
        feed(model, cache, prompt(size), size)
    assert cache.profile is None


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


def test_labels_build_it_too() -> None:
    model = tiny()
    ids = prompt(2 * MIN_TOKENS)
    with nexusquant_evict(model) as run:
        model(ids, labels=ids)
    assert run.profile is not None


@pytest.mark.parametrize("settings", [{"codec": "exact"}, {"transform": "hadamard"}], ids=str)
def test_settings_without_a_profile_build_none(settings: dict[str, Any]) -> None:
    model = tiny()
    cache = NexusCache(model, **settings)
    feed(model, cache, prompt(LONG), LONG)
    assert cache.profile is None


def test_the_same_prompt_gives_the_same_profile() -> None:
    profiles = []
    for seed in (1, 1, 2):
        model = tiny()
        with nexusquant_evict(model) as run, torch.no_grad():
            state = torch.random.get_rng_state()
            model(prompt(LONG, seed=seed))
            assert torch.equal(torch.random.get_rng_state(), state), "no global randomness"
        assert run.profile is not None
        profiles.append(run.profile)
    assert_equal(*profiles[:2])
    assert not torch.equal(profiles[0].layers[0].key.forward, profiles[2].layers[0].key.forward)


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


def test_generation_and_the_block_use_it() -> None:
    model = tiny()
    ids = prompt(LONG)
    with nexusquant_evict(model) as run:
        first = generate(model, ids, 4)
        again = generate(model, ids, 4)
    assert first.sequences.equal(again.sequences)
    caches = [out.cache for out in (first, again)]
    assert [bases(cache) for cache in caches] == [[{Profiled}] * 3] * 2
    assert run.stats.compressed_layers == 3


# -- passes that fail


@pytest.mark.parametrize("failure", [ArithmeticError, KeyboardInterrupt])
def test_a_pass_that_fails_half_way_leaves_no_profile(failure: type[BaseException]) -> None:
    model = tiny()

    def fail(*_: Any) -> None:
        raise failure("in layer 1")

    cache = NexusCache(model)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(failure, match="layer 1"):
        feed(model, cache, prompt(LONG), LONG)
    handle.remove()
    feed(model, cache, prompt(60), 60)  # too short to build one
    assert cache.profile is None
    assert cache.get_seq_length() == 60
    fresh = NexusCache(model)
    feed(model, fresh, prompt(LONG), LONG)
    whole = tiny()
    feed(whole, reference := NexusCache(whole), prompt(LONG), LONG)
    assert_equal(fresh.profile, reference.profile)


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


def test_a_profile_is_built_of_the_longest_row_without_its_padding() -> None:
    model = tiny()
    ids, mask = left_padded([100, 560, 530])
    batch = NexusCache(model)
    feed(model, batch, ids, 560, mask)
    alone_model = tiny()
    alone = NexusCache(alone_model)
    feed(alone_model, alone, ids[1:2], 560)
    assert batch.profile is not None
    assert alone.profile is not None
    assert batch.profile.tokens == alone.profile.tokens == 560
    for name, x in tensors(batch.profile).items():
        torch.testing.assert_close(x, tensors(alone.profile)[name], rtol=5e-3, atol=5e-3)
    # Padding does not count: all rows are too short here.
    model = tiny()
    ids, mask = left_padded([440, 400])
    ids, mask = (torch.nn.functional.pad(x, (120, 0)) for x in (ids, mask))
    cache = NexusCache(model)
    feed(model, cache, ids, 560, mask)
    assert cache.profile is None


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
