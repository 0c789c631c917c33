"""Profiles that come from outside: given, stored in the cache directory, or not fitting at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from nexusquant import (
    ConfigError,
    NexusCache,
    ProfileError,
    load_profile,
    nexusquant_evict,
    save_profile,
)
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.profile import Profile
from nexusquant.profile_store import default_path
from nexusquant.quantizer import Orthonormal, Profiled
from tests.hf.models import feed, generate, prompt, step_logits, tiny
from tests.hf.profile_views import LONG, bases
from tests.hf.state import State
from tests.hf.test_profiles import assert_equal

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def built(model: Any, **settings: Any) -> Profile:
    cache = NexusCache(model, **settings)
    feed(model, cache, prompt(LONG), LONG)
    assert cache.profile is not None
    return cache.profile


@pytest.fixture(scope="module")
def foreign() -> Profile:
    """The profile of another model."""
    return built(tiny(seed=5))


@pytest.mark.parametrize("error", [PermissionError("no"), OSError("File name too long"), None])
def test_a_cache_directory_out_of_reach_has_no_profile(
    monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    def fail(*_: Any) -> None:
        raise error or RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    if error is None:
        monkeypatch.setattr(Path, "home", fail)
    else:
        monkeypatch.setattr(Path, "is_file", fail)
    assert NexusCache(tiny()).profile is None


def test_a_profile_with_layers_that_the_model_lacks_is_refused() -> None:
    profile = built(tiny())
    moved = replace(profile, layers={i + 1000: x for i, x in profile.layers.items()})
    with pytest.raises(ProfileError, match=r"has a layer 100\d, the model has"):
        NexusCache(tiny(), profile=moved)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_given_profile_is_used_from_the_first_token_on(as_file: bool, tmp_path: Path) -> None:
    profile = built(tiny())
    given: Any = save_profile(profile, tmp_path / "mine.safetensors") if as_file else profile
    model = tiny()
    cache = NexusCache(model, profile=given)
    assert_equal(cache.profile, profile)
    feed(model, cache, prompt(40), 40)
    assert bases(cache) == [{Profiled}] * 3
    with nexusquant_evict(model, profile=str(given) if as_file else given) as run:
        assert_equal(run.profile, profile)
        out = generate(model, prompt(40), 2)
    assert bases(out.cache) == [{Profiled}] * 3
    assert_equal(run.profile, profile)
    assert run.stats.compressed_layers == 3
    assert NexusCache(model).profile is None, "given to those caches only"


def test_a_stored_profile_is_found(user_cache: Path) -> None:
    profile = built(tiny())
    path = save_profile(profile)
    assert path == default_path(fingerprint(tiny()), 32)
    assert path.is_relative_to(user_cache)
    model = tiny().to(torch.bfloat16)
    found = NexusCache(model).profile
    assert found is not None
    assert_equal(found, profile)
    assert NexusCache(model, "max").profile is found, "read once"
    assert NexusCache(tiny(seed=1)).profile is None
    assert NexusCache(tiny(), rope_page=0).profile is None
    long = NexusCache(model)
    feed(model, long, prompt(LONG, seed=3), LONG)
    assert long.profile is found, "nothing is built beside it"


def test_prompts_write_no_files(user_cache: Path) -> None:
    built(tiny())
    assert not user_cache.exists()


def enter(model: Any, **settings: Any) -> None:
    with nexusquant_evict(model, **settings):
        pytest.fail("complains before anything runs")


@pytest.mark.parametrize("use", [NexusCache, enter])
def test_a_damaged_stored_profile_is_named_and_what_mends_it(use: Any) -> None:
    path = default_path(fingerprint(tiny()), 32)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ProfileError, match=rf"{path}: .*delete it, or .*`nexusquant calibrate`"):
        use(tiny())


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny()
    path = save_profile(built(model), "~/mine.safetensors")
    assert path == tmp_path / "mine.safetensors"
    for given in ("~/mine.safetensors", Path("~/mine.safetensors")):
        assert NexusCache(model, profile=given).profile is not None
        with nexusquant_evict(model, profile=given) as run:
            assert run.profile is not None


@pytest.mark.parametrize("given", [{}, [], 3, b"mine.safetensors"], ids=repr)
def test_what_is_no_profile_at_all(given: Any, foreign: Profile) -> None:
    for use in (NexusCache, enter):
        with pytest.raises(ConfigError, match="a profile's file, or a Profile"):
            use(tiny(), profile=given)
    message = rf"as a Profile or as the path .*not as {type(given).__name__}"
    with pytest.raises(ProfileError, match=message):
        load_profile(given)
    with pytest.raises(ProfileError, match=message):
        save_profile(foreign, given)


@pytest.mark.parametrize("as_file", [True, False])
def test_another_models_profile_is_refused_before_anything_runs(
    as_file: bool, foreign: Profile, tmp_path: Path
) -> None:
    model = tiny()
    state = State(model)
    given: Any = save_profile(foreign, tmp_path / "theirs.safetensors") if as_file else foreign
    with pytest.raises(ProfileError, match=f"{foreign.fingerprint}, this model has"):
        NexusCache(model, profile=given)
    entered = False
    with (
        pytest.raises(ProfileError, match=f"{foreign.fingerprint}, this model has"),
        nexusquant_evict(model, profile=given),
    ):
        entered = True
    assert not entered
    state.assert_restored()


@pytest.mark.parametrize("settings", [{"codec": "exact"}, {"transform": "hadamard"}], ids=str)
def test_a_wrong_profile_is_refused_even_where_none_is_used(
    settings: dict[str, Any], foreign: Profile
) -> None:
    with pytest.raises(ProfileError, match="another model"):
        NexusCache(tiny(), profile=foreign, **settings)
    with (
        pytest.raises(ProfileError, match="another model"),
        nexusquant_evict(tiny(), profile=foreign, **settings),
    ):
        pass


def test_a_profile_of_another_key_frame_is_refused() -> None:
    model = tiny()
    profile = built(model, rope_page=8)
    assert profile.rope_page == 8
    message = "built with rope_page=8, the cache is configured with rope_page=32"
    with pytest.raises(ProfileError, match=message):
        NexusCache(model, profile=profile)
    with pytest.raises(ProfileError, match=message), nexusquant_evict(model, profile=profile):
        pass
    assert NexusCache(model, profile=profile, rope_page=8).profile is profile


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.safetensors"
    with pytest.raises(ProfileError, match=r"nowhere\.safetensors"):
        NexusCache(tiny(), profile=path)


# -- models of other kinds


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=96, n_positions=800, n_embd=64, n_layer=3, n_head=4, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def smollm3() -> Any:
    """Every second layer without rotary embedding, although all are passed its rows."""
    return SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1, 0]))


def cohere2() -> Any:
    """Sliding layers with, full layers without."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return Cohere2ForCausalLM(Cohere2Config(**SMALL, sliding_window=600, layer_types=kinds))


def gemma3() -> Any:
    """Two rotary embeddings, and windows wide enough to learn from."""
    return tiny("gemma3", sliding_window=600)


def partial() -> Any:
    return tiny("gpt_neox", rotary_pct=0.25)


@pytest.mark.parametrize("page", [1, 32])
@pytest.mark.parametrize(
    "build", [gpt2, partial, gemma3, smollm3, cohere2], ids=lambda build: build.__name__
)
def test_profiles_of_other_kinds_of_model(build: Any, page: int) -> None:
    torch.manual_seed(0)
    model = build().eval()
    settings = {"key_bits": 6, "value_bits": 6, "rope_page": page, "evict_ratio": 0.0}
    profile = built(model, **settings)
    count = model.config.num_hidden_layers
    assert list(profile.layers) == list(range(count))
    cache = NexusCache(model, **settings)
    ours = generate(model, prompt(LONG, seed=2), 8, cache=cache)
    assert bases(cache) == [{Profiled}] * count
    stock = generate(model, prompt(LONG, seed=2), 8)
    drift = (step_logits(ours) - step_logits(stock))[:, 1:3].abs().max()
    assert drift < 0.07 * step_logits(stock).std()
    for layer in profile.layers.values():
        for side in (layer.key, layer.value):
            eye = torch.eye(side.forward.shape[-1]).expand_as(side.forward)
            torch.testing.assert_close(side.forward @ side.inverse, eye, rtol=0, atol=1e-3)


def test_layers_that_saw_too_few_tokens_stay_with_hadamard() -> None:
    """Windows of 24 tokens never have enough; the budget is that of the layers that do."""
    model = tiny("gemma3")
    settings = {"residual_length": 8, "recent": 4}
    assert list(built(model, **settings).layers) == [1]
    cache = NexusCache(model, **settings)
    feed(model, cache, prompt(LONG), LONG)
    assert bases(cache) == [{Orthonormal}, {Profiled}, {Orthonormal}]
