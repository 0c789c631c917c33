"""What goes into a file comes out, as near as its bits allow, and the model goes on behind it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import nexusquant
from nexusquant import CompressionConfig, NexusCache, load, save
from nexusquant.hf import profiles
from nexusquant.hf.cache import plain_cache
from nexusquant.prefix.rotary import cached_layers
from tests.prefix.stored_cases import KINDS, case, divergence, go_on, ids, model_of, pairs, read

TOKENS = 600
pytestmark = pytest.mark.filterwarnings("ignore:this model has no profile for live caches")


def sent(cache: Any, path: Path, model: Any, profile: Any, bits: float, **options: Any) -> Any:
    save(cache, path, model=model, profile=profile, bits=bits, embed_profile=False)
    return load(path, model, store_profile=profile, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_are_nearer(kind: str, tmp_path: Path) -> None:
    model, profile = case(kind)
    stock = read(model, ids(TOKENS))
    sizes, apart = [], []
    for bits in (0.5, 1.5, 3, 8):
        again = sent(stock, tmp_path / "p", model, profile, bits)
        assert type(again) is DynamicCache
        assert again.get_seq_length() == TOKENS
        assert [type(x) for x in again.layers] == [type(x) for x in stock.layers]
        for mine, theirs in pairs(again, stock):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        apart.append(divergence(model, stock, again))
        sizes.append((tmp_path / "p").stat().st_size)
    assert sizes == sorted(sizes)
    assert apart == sorted(apart, reverse=True)
    assert apart[0] > 1e-4  # it is no other path that is measured
    assert apart[2] < apart[0] / 10
    assert apart[3] < (1e-3 if kind == "bfloat16" else 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_many_bits_are_nearly_exact(kind: str, tmp_path: Path) -> None:
    model, profile = case(kind)
    stock = read(model, ids(300))
    again = sent(stock, tmp_path / "p", model, profile, 14)
    for mine, theirs in pairs(again, stock):
        near = 2e-2 if kind == "bfloat16" else 2e-3
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)
    assert torch.equal(go_on(model, ids(300), again), go_on(model, ids(300), stock))


@pytest.mark.parametrize("kind", KINDS)
def test_every_flavour_of_rope_is_told_apart(kind: str) -> None:
    """Position 0 looks the same in all of them."""
    model = case(kind)[0]
    cached = cached_layers(model)
    keys = torch.randn(2, 40, 16)
    for index, layer in cached.items():
        torch.testing.assert_close(layer.leave(layer.enter(keys, 70), 70), keys)
        assert (layer.table is None) == ((kind, index) in {("smollm3", 1), ("smollm3", 3),
            ("cohere2", 1), ("cohere2", 3)})  # fmt: skip
    if kind == "gemma3":
        assert not torch.allclose(cached[0].enter(keys, 70), cached[1].enter(keys, 70), atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_keys_come_without_rope(kind: str) -> None:
    """The same token has the same key in the first layer wherever it stands."""
    model = case(kind)[0]
    cached = cached_layers(model)[0]
    stock = read(model, torch.full((1, 40), 7))
    keys = cached.enter(stock.layers[0].keys[0], 0)
    torch.testing.assert_close(keys, keys[:, :1].expand_as(keys), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 47, 48, 49, 51, 255, 260, 261])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_any_length(kind: str, tokens: int, tmp_path: Path) -> None:
    model, profile = case(kind)
    stock = read(model, ids(tokens))
    again = sent(stock, tmp_path / "p", model, profile, 8)
    assert again.get_seq_length() == tokens
    assert all(mine.shape == theirs.shape for mine, theirs in pairs(again, stock))
    assert divergence(model, stock, again) < 1e-4


def test_the_least_bits_of_a_long_prefix_can_be_read(tmp_path: Path) -> None:
    model, profile = case("llama")
    stock = read(model, torch.full((1, 3000), 7))
    saved = save(
        stock, tmp_path / "p", model=model, profile=profile, bits=0.05,
        embed_profile=False,
    )  # fmt: skip
    assert saved.ratio > 100
    assert load(tmp_path / "p", model, store_profile=profile).get_seq_length() == 3000


@pytest.mark.parametrize("quality", ["lossless", "high", CompressionConfig(evict_ratio=0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_into_a_live_cache(
    kind: str, quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "_known", weakref.WeakKeyDictionary())  # models are shared here
    model, profile = case(kind)
    stock = read(model, ids(TOKENS))
    direct = read(model, ids(TOKENS), NexusCache(model, quality))
    if direct.profile is not None:
        profiles.remember_profile(model, direct.profile)
    again = sent(stock, tmp_path / "p", model, profile, 8, quality=quality)
    assert isinstance(again, NexusCache)
    assert again.get_seq_length() == TOKENS
    assert again.stats().kept_tokens == direct.stats().kept_tokens
    assert again.compression_ratio > (1.5 if quality == "lossless" else 2.5)
    apart = [divergence(model, stock, cache) for cache in (again, direct)]
    assert apart[0] < 1.5 * apart[1] + 1e-2
    out = go_on(model, ids(TOKENS), again, 40)
    assert out.shape == (1, TOKENS + 43)
    assert again.get_seq_length() == TOKENS + 42


def test_a_live_cache_with_little_room(tmp_path: Path) -> None:
    """Blocks that are shorter than what the model is shown to learn its rotation."""
    model, profile = case("gemma3")
    stock = read(model, ids(200))
    config = CompressionConfig(residual_length=4, recent=2, scorer="kvzip")
    again = sent(stock, tmp_path / "p", model, profile, 8, quality=config)
    assert again.stats().kept_tokens == (200 + 47 + 47) / 3
    assert divergence(model, stock, again) < 0.2
    go_on(model, ids(200), again)


def test_max_tokens_bounds_what_is_loaded(tmp_path: Path) -> None:
    model, profile = case("llama")
    config = CompressionConfig(max_tokens=64, recent=8)
    again = sent(read(model, ids(200)), tmp_path / "p", model, profile, 8, quality=config)
    direct = read(model, ids(200), NexusCache(model, config))
    for cache in (again, direct):
        go_on(model, ids(200), cache, 70)
    assert again.stats().kept_tokens == direct.stats().kept_tokens < 80


def test_tokens_leave_as_of_a_cache_that_saw_the_queries(tmp_path: Path) -> None:
    model, profile = case("llama")
    config = CompressionConfig(codec="exact", evict_ratio=0.5)
    stock, direct = read(model, ids(TOKENS)), read(model, ids(TOKENS), NexusCache(model, config))
    again = sent(stock, tmp_path / "p", model, profile, 8, quality=config)
    assert again.stats().kept_tokens == direct.stats().kept_tokens < 0.6 * TOKENS
    kept = [
        {(x.layer_idx, h, int(slot)) for x in cache.layers for part in x.stored.parts()
         for h, row in enumerate(part.slots.positions(model.device)[0]) for slot in row}
        for cache in (direct, again)
    ]  # fmt: skip
    # Half of the rank is the attention of the latest queries, of which the file has a sample.
    assert len(kept[0] & kept[1]) > 0.85 * len(kept[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_live_cache_gives_the_same_file(kind: str, tmp_path: Path) -> None:
    model, profile = case(kind)
    stock = read(model, ids(300))
    exact = read(model, ids(300), NexusCache(model, codec="exact", evict_ratio=0.0))
    for name, cache in (("stock", stock), ("exact", exact)):
        save(cache, tmp_path / name, model=model, profile=profile, codec="entropy")
    files = [(tmp_path / name).read_bytes() for name in ("stock", "exact")]
    assert files[0] == files[1]


def test_a_prefix_that_was_read_in_turns_and_generated(tmp_path: Path) -> None:
    model, profile = case("gemma3")
    prefix = ids(300)
    cache = plain_cache(model)
    for part in prefix.split([120, 1, 130, 49], 1):
        read(model, part, cache)
    whole = go_on(model, prefix, cache)
    again = sent(cache, tmp_path / "p", model, profile, 8)
    assert again.get_seq_length() == whole.shape[1] - 1
    assert divergence(model, cache, again) < 1e-5


def test_a_live_cache_comes_back_to_the_bit(tmp_path: Path) -> None:
    model, _ = case("llama")
    for codec in ("auto", "raw", "zstd", "zstd+delta"):
        cache = read(model, ids(TOKENS), NexusCache(model, "high"))
        saved = save(cache, tmp_path / "p", tokens=ids(TOKENS), codec=codec)
        again = load(tmp_path / "p", model)
        assert (saved.tokens, saved.nbytes) == (TOKENS, (tmp_path / "p").stat().st_size)
        assert again.nbytes == cache.nbytes
        mine, theirs = (go_on(model, ids(TOKENS), x) for x in (again, cache))
        assert torch.equal(mine, theirs)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model, profile = model_of("llama"), case("llama")[1]
    model.train()
    model.model.layers[1].eval()
    stock = read(model, ids(100))
    state = torch.random.get_rng_state()
    save(stock, tmp_path / "p", model=model, profile=profile)
    load(tmp_path / "p", model, store_profile=profile)
    assert model.training
    assert [layer.training for layer in model.model.layers] == [True, False, True]
    assert not model.model.layers[1].mlp.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_bits_are_what_a_file_takes(tmp_path: Path) -> None:
    model, profile = case("llama")
    stock = read(model, ids(3000))
    for bits in (0.5, 1.5, 4, 8):
        saved = save(
            stock, tmp_path / "p", model=model, profile=profile, bits=bits, embed_profile=False
        )
        assert saved.ratio == pytest.approx(16 / bits, rel=0.15)
        assert str(saved).startswith(f"3,000 tokens in {saved.nbytes / 2**20:.2f} MiB")


def test_it_is_part_of_the_package() -> None:
    assert nexusquant.load is load
    assert nexusquant.save is save
