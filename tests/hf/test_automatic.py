"""Profiles that nobody asked for: calibrated once on the package's text, kept, the same for all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import ConfigError, NexusCache, calibrate, nexusquant_evict, save_profile
from nexusquant.hf import automatic
from nexusquant.hf.automatic import SAMPLED, SOURCE, remember_tokenizer
from nexusquant.hf.notices import NexusQuantWarning, Notices
from nexusquant.hf.profiles import FIRST_PROMPT, MODES, _known
from tests.hf.models import prompt, tiny
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer
from tests.zoo.builders import build


@pytest.fixture(autouse=True)
def automatically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEXUSQUANT_PROFILE", raising=False)
    monkeypatch.setattr(automatic, "_notices", Notices())


@pytest.fixture
def model() -> Any:
    tokenizer = tiny_tokenizer()
    made = tiny_model(len(tokenizer))
    remember_tokenizer(made, tokenizer)
    return made


@torch.no_grad()
def read(model: Any, cache: NexusCache, ids: Tensor) -> tuple[Tensor, int]:
    """Logits of what comes behind the prompt, and the bytes."""
    model(ids[:, :-20], cache=cache)
    return model(ids[:, -20:], cache=cache).logits, cache.nbytes


def ids_of(seed: int) -> Tensor:
    return torch.randint(2, 280, (1, 480), generator=torch.Generator().manual_seed(seed))


def test_the_first_cache_calibrates_and_says_so(
    model: Any, user_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        cache = NexusCache(model, quality="high")
        NexusCache(model, quality="balanced")
    assert cache.profile is not None
    assert cache.profile.source == SOURCE
    assert [x.message.split(" for")[0] for x in caplog.records] == ["calibrating LlamaForCausalLM"]
    assert len(list((user_cache / "profiles").iterdir())) == 1


def test_another_process_finds_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = NexusCache(model).profile
    _known.clear()  # as in a new process
    monkeypatch.setattr(automatic, "show", lambda *_: pytest.fail("it calibrates again"))
    again = NexusCache(model).profile
    assert again is not first
    assert again is not None
    assert again.source == SOURCE
    assert torch.equal(again.layers[0].key.forward, first.layers[0].key.forward)


@pytest.mark.parametrize("source", [SOURCE, "text"])
def test_what_an_older_version_calibrated_is_made_anew_unless_it_is_the_users(
    model: Any, user_cache: Path, source: str
) -> None:
    made = NexusCache(model).profile
    assert made is not None
    old = {i: replace(layer, rank_costs=None) for i, layer in made.layers.items()}
    save_profile(replace(made, source=source, layers=old, _layouts={}))
    _known.clear()
    found = NexusCache(model).profile
    assert found is not None
    assert (found.layers[0].rank_costs is None) == (source != SOURCE)
    assert len(list((user_cache / "profiles").iterdir())) == (3 if source == SOURCE else 2)


def test_the_same_call_gives_the_same_in_any_order(model: Any) -> None:
    a, b = ids_of(1), ids_of(2)
    alone = read(model, NexusCache(model, "high"), b)
    _known.clear()
    read(model, NexusCache(model, "high"), a)
    for _ in range(2):
        logits, size = read(model, NexusCache(model, "high"), b)
        assert torch.equal(logits, alone[0])
        assert size == alone[1]


def test_blocks_do_it_too(model: Any) -> None:
    with nexusquant_evict(model, "high") as run:
        model(ids_of(1))
    assert run.profile is not None
    assert run.profile.source == SOURCE


def test_a_profile_of_the_users_own_goes_first(model: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "
    own = calibrate(model, tiny_tokenizer(), [text * 60])
    assert NexusCache(model).profile is own


def test_without_a_tokenizer_the_model_writes_text_until_there_is_one() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    before = NexusCache(model, "high")
    assert before.profile is not None
    assert before.profile.source == SAMPLED
    assert NexusCache(model).profile is before.profile
    remember_tokenizer(model, tokenizer)
    after = NexusCache(model, "high")
    assert after.profile is not None
    assert after.profile.source == SOURCE
    assert before.profile.source == SAMPLED, "a cache that lives keeps its own"


def test_a_tokenizer_beside_the_weights_is_found(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = NexusCache(model).profile
    assert found is not None
    assert found.source == SOURCE


def test_a_home_that_cannot_be_written_is_said_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.warns(NexusQuantWarning, match="every process calibrates anew") as said:
        first = NexusCache(model).profile
    assert len(said) == 1
    assert first is not None
    assert NexusCache(model).profile is first


def test_a_model_that_cannot_be_calibrated_goes_by_its_first_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(max_position_embeddings=100)
    with pytest.warns(NexusQuantWarning, match="could not be calibrated .it takes 100 tokens"):
        cache = NexusCache(model, "high")
    assert cache.profile is None
    monkeypatch.setattr(automatic, "_calibrated", lambda *_: pytest.fail("it tries again"))
    NexusCache(model)
    with torch.no_grad():
        model(prompt(480), cache=cache)
    assert cache.profile is not None
    assert cache.profile.source == FIRST_PROMPT


def test_the_other_modes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "show", lambda *_: pytest.fail("it calibrates"))
    none = NexusCache(model, "high", profile="none")
    read(model, none, ids_of(1))
    assert none.profile is None
    monkeypatch.setenv("NEXUSQUANT_PROFILE", "first-prompt")
    for cache in (NexusCache(model, "high"), NexusCache(model, "high", profile="first-prompt")):
        read(model, cache, ids_of(1))
        assert cache.profile is not None
        assert cache.profile.source == FIRST_PROMPT


def test_what_a_prompt_has_built_is_not_for_those_who_did_not_ask(model: Any) -> None:
    read(model, NexusCache(model, profile="first-prompt"), ids_of(1))
    found = NexusCache(model).profile
    assert found is not None
    assert found.source == SOURCE


def test_nothing_is_calibrated_for_codes_that_use_no_profile(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "show", lambda *_: pytest.fail("it calibrates"))
    assert NexusCache(model, transform="hadamard").profile is None
    assert NexusCache(model, codec="exact").profile is None


def test_nothing_is_calibrated_for_models_of_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "show", lambda *_: pytest.fail("it calibrates"))
    assert NexusCache(build("deepseek_v3")).profile is None


@pytest.mark.parametrize("given", [3, 0.5, ["auto"], True])
def test_anything_else_is_refused(model: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match="must be one of 'auto', 'first-prompt', 'none', a prof"):
        NexusCache(model, profile=given)


def test_a_wrong_setting_of_the_environment_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUSQUANT_PROFILE", "always")
    with pytest.raises(ConfigError, match="NEXUSQUANT_PROFILE=always: must be one of auto, first"):
        NexusCache(model)


def test_the_modes_are_those_of_the_documentation() -> None:
    assert MODES == ("auto", "first-prompt", "none")
