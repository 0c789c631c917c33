"""The first long prompt of a cache builds its profile, which is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import NexusCache, nexusquant_evict
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.profiles import remember_profile
from nexusquant.profile import Profile
from nexusquant.quantizer import Orthonormal, Profiled
from nexusquant.statistics import MIN_TOKENS
from tests.hf.models import feed, generate, left_padded, prompt, tiny
from tests.hf.profile_views import LONG, bases, tensors


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
