"""Profiles from texts: which pieces are read, what comes out, and text of the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import (
    ConfigError,
    NexusCache,
    NexusQuantError,
    UnsupportedError,
    calibrate,
    nexusquant_evict,
    save_profile,
)
from nexusquant.calibration import own_text
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.profile import SIDES, Profile
from nexusquant.quantizer import Profiled
from nexusquant.sampling import PREFILL
from nexusquant.statistics import MIN_TOKENS
from tests.hf.models import tiny
from tests.tiny_checkpoint import LINES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    model = tiny_model(len(tokenizer))
    model.config.max_position_embeddings = 1 << 16
    return model


def text(tokens: int, line: int = 0) -> str:
    """A text of about that many tokens: the tokenizer has one for every few letters."""
    return "ABCDEFGHIJKLMNOP " + (LINES[line] + " ") * (tokens // 3)


class Read:
    """The ids that a model is given, call by call."""

    def __init__(self, model: Any) -> None:
        self.ids: list[Tensor] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.ids.append((args or (kwargs["input_ids"],))[0]),
            with_kwargs=True,
        )


def first_layer(profile: Profile) -> Tensor:
    return profile.layers[0].key.forward


def test_calibrate_makes_a_profile_in_force(model: Any, tokenizer: Any) -> None:
    lines: list[str] = []
    profile = calibrate(
        model, tokenizer, [text(2000)], tokens=512, pieces=2, source="proverbs",
        report=lines.append,
    )  # fmt: skip
    assert profile.complete
    assert list(profile.layers) == [0, 1]
    assert (profile.source, profile.tokens, profile.rope_page) == ("proverbs", 1024, 32)
    assert profile.fingerprint == fingerprint(model)
    assert lines == ["piece 1 of 2, 512 tokens", "piece 2 of 2, 512 tokens"]
    for layer in profile.layers.values():
        for side in SIDES:
            tensors = vars(getattr(layer, side)).values()
            assert all(bool(torch.isfinite(x).all()) for x in tensors)
            assert all(not x.requires_grad for x in tensors)
    assert NexusCache(model).profile is profile
    assert NexusCache(model, rope_page=1).profile is None
    path = save_profile(profile)
    found = NexusCache(copy.deepcopy(model)).profile
    assert found is not profile
    assert found is not None
    assert torch.equal(first_layer(found), first_layer(profile))
    assert path.is_file()


def test_layers_with_short_windows_are_calibrated_too(tokenizer: Any) -> None:
    model = tiny("gemma3", vocab_size=len(tokenizer), sliding_window=100)
    profile = calibrate(model, tokenizer, [text(2000)], tokens=512, pieces=3)
    assert list(profile.layers) == [0, 1, 2]
    cache = NexusCache(model)
    with torch.no_grad():
        model(tokenizer(text(900), return_tensors="pt").input_ids[:, :300], cache=cache)
    for layer in cache.layers:
        assert isinstance(layer.stored.body[0].key_quantizer.basis, Profiled)


def test_it_replaces_the_profile_of_an_earlier_prompt(model: Any, tokenizer: Any) -> None:
    cache = NexusCache(model)
    with torch.no_grad():
        model(tokenizer(text(1000), return_tensors="pt").input_ids[:, :600], cache=cache)
    assert cache.profile is not None
    profile = calibrate(model, tokenizer, [text(600, line=1)], rope_page=32)
    assert NexusCache(model).profile is profile is not cache.profile


def test_pieces_are_taken_in_turn(model: Any, tokenizer: Any) -> None:
    texts = [text(1700, 0), text(100, 1), text(3000, 1)]
    ids = [tokenizer(x, return_tensors="pt").input_ids for x in texts]
    assert ids[0].shape[1] > 2 * 600
    assert ids[1].shape[1] < 512
    assert ids[2].shape[1] > 3 * 600
    read = Read(model)
    profile = calibrate(model, tokenizer, iter(texts), tokens=600, pieces=4)
    want = [ids[0][:, :600], ids[2][:, :600], ids[0][:, 600:1200], ids[2][:, 600:1200]]
    assert len(read.ids) == 4
    assert all(torch.equal(a, b) for a, b in zip(read.ids, want, strict=True))
    assert profile.tokens == 4 * 600


def test_a_last_piece_counts_if_it_is_long_enough(model: Any, tokenizer: Any) -> None:
    source = text(1700)
    total = tokenizer(source, return_tensors="pt").input_ids.shape[1]
    for tokens in (total - MIN_TOKENS, total - MIN_TOKENS + 1):
        read = Read(model)
        calibrate(model, tokenizer, [source], tokens=tokens)
        have = [part.shape[1] for part in read.ids]
        assert have == ([tokens, MIN_TOKENS] if tokens == total - MIN_TOKENS else [tokens])


def test_texts_count_the_same_and_the_result_is_reproducible(model: Any, tokenizer: Any) -> None:
    texts = [text(600, 0), text(600, 1)]
    single = [calibrate(model, tokenizer, [x], tokens=512, pieces=1) for x in texts]
    both = [calibrate(model, tokenizer, texts, tokens=512, pieces=2) for _ in range(2)]
    assert torch.equal(first_layer(both[0]), first_layer(both[1]))
    for index, layer in both[0].layers.items():
        for side in SIDES:
            parts = [getattr(profile.layers[index], side) for profile in single]
            mine = getattr(layer, side)
            for name in ("mean", "weight"):
                want = sum(getattr(part, name) for part in parts) / 2
                torch.testing.assert_close(getattr(mine, name), want)


def test_one_piece_is_what_a_prompt_of_it_gives(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the sampling, which has more time."""
    monkeypatch.setattr("nexusquant.hf.collecting.CALIBRATION", PREFILL)
    ids = tokenizer(text(1000), return_tensors="pt").input_ids[:, :600]
    profile = calibrate(model, tokenizer, [text(1000)], tokens=600, pieces=1)
    other = copy.deepcopy(model)  # has no profile
    cache = NexusCache(other)
    with torch.no_grad():
        other(ids, cache=cache)
    assert cache.profile is not None
    for index, layer in profile.layers.items():
        for side in SIDES:
            pairs = zip(
                vars(getattr(layer, side)).values(),
                vars(getattr(cache.profile.layers[index], side)).values(),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    calibrate(model, tokenizer, [text(700)], tokens=600)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["short"], {}, "none of the 1 texts has 448 tokens"),
        (["short", "and sweet"], {}, "none of the 2 texts has 448 tokens"),
        ([], {}, "none of the 0 texts has 448 tokens"),
        (text(3000), {}, "a list of texts, got str"),
        (5, {}, "a list of texts, got int"),
        ([text(3000), None], {}, "texts must be strings, got NoneType"),
        (b"text", {}, "texts must be strings, got int"),
        ([text(3000)], {"tokens": 256}, "tokens=256: must be an integer of at least 448"),
        ([text(3000)], {"tokens": 512.5}, "tokens=512.5: must be"),
        ([text(3000)], {"tokens": "600"}, "tokens='600': must be"),
        ([text(3000)], {"pieces": 0}, "pieces=0: must be an integer of at least 1"),
        ([text(3000)], {"pieces": 1.5}, "pieces=1.5: must be"),
        ([text(3000)], {"pieces": True}, "pieces=True: must be"),
        ([text(3000)], {"rope_page": -1}, "rope_page=-1: must be"),
    ],
)
def test_nothing_to_learn_from(
    model: Any, tokenizer: Any, texts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(model, tokenizer, texts, **settings)
    assert NexusCache(model).profile is None
    assert not model._forward_pre_hooks


def test_a_model_that_takes_too_few_tokens(model: Any, tokenizer: Any) -> None:
    model.config.max_position_embeddings = 300
    with pytest.raises(ConfigError, match="takes 300 tokens at most, but a profile needs 448"):
        calibrate(model, tokenizer, [text(3000)])


def test_pieces_are_no_longer_than_the_model_takes(model: Any, tokenizer: Any) -> None:
    model.config.max_position_embeddings = 600
    read = Read(model)
    calibrate(model, tokenizer, [text(3000)], pieces=1)
    assert [ids.shape[1] for ids in read.ids] == [600]


def test_dropout_is_off_meanwhile(model: Any, tokenizer: Any) -> None:
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    model.train()
    calibrate(model, tokenizer, [text(700)], tokens=600)
    assert seen
    assert not any(seen)
    assert model.training


def test_what_cannot_have_a_compressed_cache(tokenizer: Any) -> None:
    with pytest.raises(UnsupportedError, match="got Linear"):
        calibrate(torch.nn.Linear(2, 2), tokenizer, [text(600)])


def test_a_block_around_it_is_left_alone(model: Any, tokenizer: Any) -> None:
    with nexusquant_evict(model, "max") as run:
        texts = own_text(model, tokenizer, tokens=600, pieces=1)
        profile = calibrate(model, tokenizer, texts)
        with pytest.raises(NexusQuantError, match="no cache was used"):
            _ = run.stats
        with torch.no_grad():
            model(torch.zeros(1, 40, dtype=torch.long))
        assert run.stats.tokens == 40
        calibrate(model, tokenizer, texts)
        assert run.stats.tokens == 40
        assert run.profile is profile
    assert own_text(model, tokenizer, tokens=600, pieces=1) == texts, "sampled uncompressed"


# -- text of the model's own


def test_own_text_is_reproducible_and_leaves_the_generator_alone(
    model: Any, tokenizer: Any
) -> None:
    state = torch.random.get_rng_state()
    lines: list[str] = []
    first = own_text(model, tokenizer, tokens=40, pieces=2, report=lines.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert own_text(model, tokenizer, tokens=40, pieces=2) == first
    assert own_text(model, tokenizer, tokens=40, pieces=2, seed=7) != first
    assert lines == ["sampling text 1 of 2", "sampling text 2 of 2"]
    assert len(first) == len(set(first)) == 2
    assert all(tokenizer(x, return_tensors="pt").input_ids.shape[1] >= 20 for x in first)


def test_own_text_does_for_calibration(model: Any, tokenizer: Any) -> None:
    texts = own_text(model, tokenizer, tokens=600, pieces=1)
    profile = calibrate(model, tokenizer, texts, tokens=512, pieces=1, source="own text")
    assert (profile.source, profile.tokens) == ("own text", 512)


@pytest.mark.parametrize("settings", [
    {"tokens": 0}, {"tokens": 10.5}, {"pieces": 0}, {"pieces": 1.5},
], ids=str)  # fmt: skip
def test_own_text_of_a_strange_size(model: Any, tokenizer: Any, settings: dict[str, float]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}: must be an integer of at least 1"):
        own_text(model, tokenizer, **settings)


def test_own_text_needs_somewhere_to_start(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no begin or end token"):
        own_text(model, tokenizer)
