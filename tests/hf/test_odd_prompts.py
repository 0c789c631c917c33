"""Profiles from prompts and models that are unlike the usual ones."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaConfig, LlamaForCausalLM

from nexusquant import (
    ConfigError,
    NexusCache,
    ProfileError,
    calibrate,
    evaluate,
    load_profile,
    save_profile,
)
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.profile import Profile
from nexusquant.statistics import MIN_DISTINCT
from tests.hf.models import feed, prompt, tiny
from tests.tiny_checkpoint import tiny_tokenizer


def built(model: Any) -> Profile:
    cache = NexusCache(model)
    feed(model, cache, prompt(600), 600)
    assert cache.profile is not None
    return cache.profile


def few(distinct: int, count: int = 600) -> Any:
    """A prompt that repeats a few tokens."""
    return torch.arange(count)[None] % distinct + 2


def test_a_monotonous_prompt_builds_no_profile() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, few(MIN_DISTINCT - 1), 600)
    assert cache.profile is None
    assert NexusCache(model).profile is None
    cache.reset()
    feed(model, cache, prompt(600), 600)
    assert cache.profile is not None, "the next one does"


@torch.no_grad()
def test_a_profile_from_few_different_tokens_still_codes_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Directions that it has not seen are not blown up: 0.03, without the ridge 0.7."""
    monkeypatch.setattr("nexusquant.statistics.MIN_DISTINCT", 2)
    ids, errors = prompt(700), []
    exact = tiny()(ids).logits[0, 600:].log_softmax(-1)
    for first in (few(6), prompt(600, seed=5)):
        calm = tiny()
        feed(calm, built := NexusCache(calm), first, 600)
        assert built.profile is not None
        cache = NexusCache(calm, "lossless", profile=built.profile)
        feed(calm, cache, ids[:, :600], 600)
        found = calm(ids[:, 600:], cache=cache).logits[0].log_softmax(-1)
        errors.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert errors[0] < 20 * errors[1]


def test_text_of_few_different_tokens_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=rf"different tokens.* {MIN_DISTINCT} at least"):
        calibrate(tiny(vocab_size=len(tokenizer)), tokenizer, ["the " * 2000])


def test_a_profile_made_in_inference_mode_can_be_used_outside() -> None:
    model = tiny()
    built = NexusCache(model)
    with torch.inference_mode():
        model(prompt(600), cache=built)
    profile = built.profile
    assert profile is not None
    assert not any(x.is_inference() for x in vars(profile.layers[0].key).values())
    cache = NexusCache(model, profile=profile)
    model(prompt(600), cache=cache)
    assert model(prompt(5), cache=cache).logits.isfinite().all()


@torch.no_grad()
def test_the_inner_model_finishes_its_profile_with_the_next_pass() -> None:
    model = tiny()
    cache = NexusCache(model)
    model.model(prompt(600), cache=cache)
    profile = cache.profile
    assert profile is not None
    model.model(prompt(5), cache=cache)
    assert profile.complete
    assert cache.profile is profile


def test_memory_counts_the_profile_that_the_prompt_builds() -> None:
    result = evaluate.memory(tiny(), prompt(600), "high")
    assert result.compressed == pytest.approx(result.stats.nbytes, rel=0.02)


def odd_heads() -> Any:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=40, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_heads_that_cannot_be_coded_are_nothing_to_calibrate() -> None:
    text = tiny_tokenizer().decode(prompt(2000)[0] + 20)
    with pytest.raises(ProfileError, match="no text reached an attention layer"):
        calibrate(odd_heads(), tiny_tokenizer(), [text])


def test_a_profile_of_other_shapes_is_named() -> None:
    model, wide = tiny(), tiny(num_key_value_heads=4)
    profile = built(wide)
    profile.fingerprint = fingerprint(model)
    with pytest.raises(ProfileError, match=r"4 KV heads .* the model has 2 of 16"):
        feed(model, NexusCache(model, profile=profile), prompt(600), 600)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    model = tiny()
    path = save_profile(built(model), tmp_path / "p.safetensors")
    first = NexusCache(model, profile=path)
    again = NexusCache(model, profile=str(path))
    assert again.profile is first.profile
    path.write_bytes(b"something else")
    with pytest.raises(ProfileError, match="not a readable profile"):
        NexusCache(model, profile=path)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere files have no such permission bits")
def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path = save_profile(built(tiny()), tmp_path / "p.safetensors")
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert load_profile(path).complete


def test_offloaded_models_are_told_apart() -> None:
    models = [tiny(), tiny(), tiny()]
    with torch.no_grad():
        models[2].model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    known = [fingerprint(model) for model in models]
    for model in models:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert models[0].model.layers[0].self_attn.q_proj.weight.is_meta
    assert [fingerprint(model) for model in models] == known
    assert known[0] == known[1] != known[2]


def test_weights_that_nobody_has_are_like_no_others() -> None:
    with torch.device("meta"):
        models = [LlamaForCausalLM(tiny().config) for _ in range(2)]
    assert fingerprint(models[0]) != fingerprint(models[1])
    assert fingerprint(models[0]) == fingerprint(models[0])


def test_calibration_looks_at_the_weights_anew() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny(vocab_size=len(tokenizer))
    before = fingerprint(model)
    model.model.layers[0].self_attn.q_proj.weight.data += 1
    text = tokenizer.decode(prompt(2000)[0] + 20)
    assert calibrate(model, tokenizer, [text], tokens=448, pieces=1).fingerprint != before
