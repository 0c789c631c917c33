"""A compressed cache goes through a file and on with its model, bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nexusquant import (
    CompressionConfig,
    ConfigError,
    NexusCache,
    NonFiniteError,
    UnsupportedError,
    nexusquant_evict,
    nxq,
    save,
)
from nexusquant.demo import demo_text
from nexusquant.hf.profiles import remember_profile
from nexusquant.loading import demo_model, load_model
from nexusquant.prefix.live import live_streams, load_live
from nexusquant.prefix.payloads import PAYLOADS
from tests.hf.models import generate, left_padded, prompt, tiny
from tests.prefix.live_cases import UNEVEN, feed, go_on_alike, loaded, packed, sent
from tests.zoo.builders import build

SETTINGS: dict[str, dict[str, Any]] = {
    "uneven heads": UNEVEN,
    "same tokens in all heads": {"per_head": False},
    "exact": {**UNEVEN, "codec": "exact"},
    "exact, whole": {"codec": "exact", "evict_ratio": 0.0},
    "hadamard": {"transform": "hadamard"},
    "identity": {"transform": "identity", "levels": "uniform", "overload": 1.25},
    "one tier": {"tiers": ()},
    "rotated": {"rope_page": 0},
    "without RoPE": {"rope_page": 1},
    "bounded": {"max_tokens": 64, "recent": 8},
    "no sinks": {"sinks": 0},
    "small blocks": {"residual_length": 4, "recent": 2},
    "two passes": {"scorer": "kvzip"},
}


@pytest.mark.parametrize("quality", ["lossless", "high", "balanced", "max"])
@pytest.mark.parametrize("tokens", [0, 5, 60, 500])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_it_goes_on_as_the_first(kind: str, tokens: int, quality: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, quality)
    if tokens:
        feed(model, cache, prompt(tokens))
    again = sent(cache, model)
    assert again.profile is cache.profile
    for count in (3, 40, 1):
        assert torch.equal(*(feed(model, each, prompt(count)) for each in (cache, again)))
    assert again.nbytes == cache.nbytes


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gpt_neox", "opt"])
def test_other_models(kind: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model)
    feed(model, cache, prompt(70))
    go_on_alike(model, (cache, sent(cache, model)))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, kind: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, "balanced", **SETTINGS[name])
    for count in (300, 1, 1, 35):
        feed(model, cache, prompt(count))
    if SETTINGS[name].get("head_safeguard") and kind == "llama":
        assert any(part.heads for layer in cache.layers for part in layer.stored.body)
    again = sent(cache, model, "zstd+delta")
    go_on_alike(model, (cache, again))
    go_on_alike(model, (cache, sent(again, model)))


@pytest.mark.parametrize("quality", ["lossless", "balanced"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_left_padded_rows(kind: str, quality: str) -> None:
    model = tiny(kind)
    ids, mask = left_padded([80, 33, 5])
    cache = NexusCache(model, quality)
    feed(model, cache, ids, mask)
    again = sent(cache, model)
    for count in (1, 1, 40):
        mask = torch.cat([mask, mask.new_ones(3, count)], 1)
        assert torch.equal(*(feed(model, x, prompt(count, 3), mask) for x in (cache, again)))


def test_generate_goes_on_from_it() -> None:
    model = tiny()
    ids, mask = left_padded([60, 41])
    cache = NexusCache(model)
    first = generate(model, ids, 12, cache=cache, attention_mask=mask)
    again = sent(cache, model)
    turn = torch.cat([first.sequences, prompt(9, 2)], 1)
    seen = torch.cat([mask, mask.new_ones(2, 21)], 1)
    mine, theirs = (
        generate(model, turn, 40, cache=each, attention_mask=seen) for each in (cache, again)
    )
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(torch.equal(*pair) for pair in zip(mine.logits, theirs.logits, strict=True))


def test_rows_that_were_repeated_and_selected() -> None:
    model = tiny()
    ids, mask = left_padded([60, 41])
    cache = NexusCache(model)
    feed(model, cache, ids, mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    go_on_alike(model, (cache, sent(cache, model)))


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2", "jamba", "bamba", "qwen3_next"])
def test_states(kind: str) -> None:
    model = build(kind)
    for tokens in (0, 1, 60):
        cache = NexusCache(model)
        if tokens:
            feed(model, cache, prompt(tokens))
        again = sent(cache, model)
        for count in (5, 1, 40):
            assert torch.equal(*(feed(model, x, prompt(count)) for x in (cache, again)))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_half_precision(kind: str) -> None:
    model = tiny(kind).bfloat16()
    cache = NexusCache(model)
    feed(model, cache, prompt(70))
    go_on_alike(model, (cache, sent(cache, model)))


def test_the_cache_of_a_block() -> None:
    model = tiny()
    with nexusquant_evict(model, "balanced", recent=16):
        first = generate(model, prompt(60), 5)
    cache = first.cache
    again = loaded(packed(cache), model)
    assert isinstance(again, NexusCache)
    assert again.config == CompressionConfig.from_json(again.config.to_json())
    assert again.config.recent == 16
    with nexusquant_evict(model, "balanced", recent=16):
        turn = torch.cat([first.sequences, prompt(9)], 1)
        mine, theirs = (generate(model, turn, 5, cache=x) for x in (cache, again))
    assert torch.equal(mine.sequences, theirs.sequences)


def test_a_cache_that_was_reset_or_unpickled() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(60))
    again = loaded(packed(pickle.loads(pickle.dumps(cache))), model)
    go_on_alike(model, (cache, again))
    cache.reset()
    again = sent(cache, model)
    for count in (60, 1):
        assert torch.equal(*(feed(model, x, prompt(count)) for x in (cache, again)))


def test_in_the_middle_of_drafts() -> None:
    model = tiny()
    cache = NexusCache(model, residual_length=8, recent=4)
    cache.activate_past_recording()
    feed(model, cache, prompt(40))
    with pytest.raises(UnsupportedError, match="wait for a crop"):
        live_streams(cache)
    cache.crop(-2)
    again = sent(cache, model)
    for each in (cache, again):
        feed(model, each, prompt(6))
        each.crop(-3)
    assert torch.equal(*(feed(model, each, prompt(5)) for each in (cache, again)))


@pytest.mark.parametrize("codec", PAYLOADS)
def test_codecs_and_files(codec: str, tmp_path: Path) -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(500))
    remember_profile(model, cache.profile)
    path = tmp_path / "cache.nxq"
    nxq.write_file(path, *live_streams(cache, codec))
    with nxq.Reader.open(path) as reader:
        assert reader.meta["codec"] == codec
        again = load_live(reader, model)
    go_on_alike(model, (cache, again))


def test_levels_of_zstandard() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(500))
    remember_profile(model, cache.profile)
    data = [packed(cache, "zstd", level=level) for level in (1, 19)]
    assert all(packed(loaded(x, model)) == packed(cache) for x in data)
    with pytest.raises(ConfigError, match="level=0"):
        live_streams(cache, "zstd", level=0)
    with pytest.raises(ConfigError, match=r"codec='gzip'.*raw, zstd, zstd\+delta"):
        live_streams(cache, "gzip")


def test_what_is_no_compressed_cache() -> None:
    with pytest.raises(UnsupportedError, match="no layer of this DynamicCache is compressed"):
        live_streams(DynamicCache())


def test_another_model_is_refused() -> None:
    model, other = tiny(), tiny(seed=1)
    cache = NexusCache(model)
    feed(model, cache, prompt(60))
    data = packed(cache)
    with pytest.raises(UnsupportedError, match=r"fingerprint is '\w{16}', this one's is '\w{16}'"):
        loaded(data, other)
    with pytest.raises(UnsupportedError, match="expected a transformers model"):
        loaded(data, torch.nn.Linear(1, 1))
    del model
    # The cache does not keep its model alive.
    with pytest.raises(UnsupportedError, match="does not exist any more"):
        live_streams(cache)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lossless", "high", "balanced", "max"])
def test_a_real_model(preset: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(demo_model(), "float32", "cpu")
    ids = tokenizer(demo_text(), return_tensors="pt").input_ids
    cache = NexusCache(model, preset)
    feed(model, cache, ids[:, :900])
    sizes = {}
    for codec in PAYLOADS:
        path = tmp_path / codec
        nxq.write_file(path, *live_streams(cache, codec))
        sizes[codec] = path.stat().st_size
        with nxq.Reader.open(path) as reader:
            again = load_live(reader, model)
        assert live_streams(again) == live_streams(cache)
    assert again.nbytes == cache.nbytes
    assert sizes["zstd"] < sizes["raw"] < 1.08 * cache.nbytes
    for start, stop in ((900, 901), (901, 902), (902, 960)):
        assert torch.equal(*(feed(model, x, ids[:, start:stop]) for x in (cache, again)))
    mine, theirs = (generate(model, ids[:, :961], 40, cache=x) for x in (cache, again))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(torch.equal(*pair) for pair in zip(mine.logits, theirs.logits, strict=True))


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = tiny()
    cache = NexusCache(model, "high")
    feed(model, cache, prompt(100))
    layer: Any = cache.layers[1]
    layer.stored.sinks.keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="cannot be saved"):
        save(cache, tmp_path / "p")
    assert not list(tmp_path.iterdir())
