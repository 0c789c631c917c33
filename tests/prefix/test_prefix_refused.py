"""What `save` refuses, before anything is written."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache, QuantizedLayer

from nexusquant import (
    ConfigError,
    NexusCache,
    NonFiniteError,
    ProfileError,
    UnsupportedError,
    nxq,
    save,
)
from nexusquant.hf.cache import plain_cache
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.stores import DirectoryStore
from tests.hf.models import tiny
from tests.prefix.stored_cases import case, ids, model_of, read

TOKENS = 100


@pytest.fixture(scope="module")
def stock() -> Any:
    return read(case("llama")[0], ids(TOKENS))


def refused(kind: type[Exception], why: str, cache: Any, path: Path, **options: Any) -> None:
    model, profile = case("llama")
    target = options.pop("target", path / "p")
    with pytest.raises(kind, match=why):
        save(cache, target, **{"model": model, "profile": profile, **options})
    assert not list(path.iterdir())


TOKEN_IDS: list[tuple[Any, str]] = [
    (ids(99), r"shape \(1, 99\) and torch.int64, but the cache holds 100"),
    (ids(100).view(2, 50), r"shape \(2, 50\)"),
    (ids(100).bool(), "torch.bool"),
    (ids(100).float(), "torch.float32"),
    ({"input_ids": ids(100)}, r"its \.input_ids"),
    ([], r"shape \(0,\)"),
    ([0.5] * 100, "must be integers"),
    ([-1] * 100, "from -1 to -1: the model has 0 to 95"),
    ([96] * 100, "from 96 to 96"),
    ([1 << 70] * 100, "must be integers"),
    ("x" * 100, "must be integers"),
    (7, "must be integers"),
    ([[1] * 100], "must be integers"),
]


@pytest.mark.parametrize(("tokens", "why"), TOKEN_IDS)
def test_token_ids_that_are_none(stock: Any, tmp_path: Path, tokens: Any, why: str) -> None:
    refused(ConfigError, why, stock, tmp_path, tokens=tokens)


@pytest.mark.parametrize("bits", [0, 0.04, 16.1, -1, float("nan"), float("inf"), "2", True])
def test_bits_out_of_range(stock: Any, tmp_path: Path, bits: Any) -> None:
    refused(ConfigError, "must be a number from 0.05 to 16", stock, tmp_path, bits=bits)


def test_arguments_that_do_not_fit(stock: Any, tmp_path: Path) -> None:
    refused(ConfigError, "unknown codec 'zip'; known: auto, entropy, raw", stock, tmp_path,
            codec="zip")  # fmt: skip
    refused(ConfigError, "key is for stores", stock, tmp_path, key="x")
    refused(ConfigError, "give model=", stock, tmp_path, model=None)
    refused(UnsupportedError, "expected a transformers model", stock, tmp_path,
            model=torch.nn.Linear(1, 1))  # fmt: skip
    live = read(case("llama")[0], ids(50), NexusCache(case("llama")[0]))
    refused(ConfigError, "profile= is of the codec 'entropy'", live, tmp_path)
    refused(ConfigError, "bits= is of the codec 'entropy'", live, tmp_path, bits=2, profile=None)
    with pytest.raises(ConfigError, match="expected a path or a store, got int"):
        save(stock, 7, model=case("llama")[0], profile=case("llama")[1])
    refused(
        ConfigError, "is not a key", stock, tmp_path, key="../x", target=DirectoryStore(tmp_path)
    )


def test_caches_that_cannot_be_coded(tmp_path: Path) -> None:
    model, _ = case("llama")

    def no(why: str, cache: Any, kind: type[Exception] = UnsupportedError) -> None:
        refused(kind, why, cache, tmp_path, codec="entropy")

    for empty in (DynamicCache(), plain_cache(model), NexusCache(model, codec="exact")):
        no("is empty", empty)
    for nothing in (
        None,
        7,
        ((torch.zeros(1),),),
        EncoderDecoderCache(plain_cache(model), plain_cache(model)),
    ):
        no("expected a cache with layers, got", nothing)
    no("holds 2 sequences", read(model, ids(80).view(2, 40)))
    no("evicted or compressed tokens: codec='raw'", read(model, ids(90), NexusCache(model)))
    evicted = NexusCache(model, codec="exact", evict_ratio=0.5)
    no("evicted or compressed", read(model, ids(200), evicted))
    cache = read(model, ids(40))
    cache.layers[1].keys = cache.layers[1].keys[:, :, :30]
    no(r"end at different tokens: \[30, 40\]", cache)


def test_caches_that_hold_more_than_keys_and_values(tmp_path: Path) -> None:
    """States of linear attention would be lost; keys of shared layers are not there."""
    hybrid = model_of("falcon_h1")
    refused(UnsupportedError, "holds other things than plain keys and values", read(
        hybrid, ids(50)), tmp_path, model=hybrid, codec="entropy", profile=case_of(hybrid),
    )  # fmt: skip
    shared = model_of("gemma3n_text")
    refused(UnsupportedError, "DummyLayer", read(
        shared, ids(50)), tmp_path, model=shared, codec="entropy", profile=case_of(shared),
    )  # fmt: skip


def case_of(model: Any) -> Any:
    """Another model's profile under this one's name."""
    return replace(case("llama")[1], fingerprint=fingerprint(model))


def test_quantized_and_encoder_decoder_models(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
    refused(UnsupportedError, "T5ForConditionalGeneration", DynamicCache(), tmp_path,
            model=T5ForConditionalGeneration(config))  # fmt: skip
    quantized: Any = read(case("llama")[0], ids(50))
    quantized.layers[1].__class__ = QuantizedLayer  # whose packages need not be installed
    refused(UnsupportedError, "other things", quantized, tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 99])
def test_numbers_that_are_not_finite(tmp_path: Path, token: int, wrong: float) -> None:
    cache = read(case("llama")[0], ids(TOKENS))
    cache.layers[2].values[0, 1, token, 3] = wrong
    refused(NonFiniteError, "NaN or infinity", cache, tmp_path)


def test_other_models(stock: Any, tmp_path: Path) -> None:
    other = tiny(seed=1)
    refused(ProfileError, "it is another model's", stock, tmp_path, model=other)
    refused(ProfileError, "no storage profile yet", stock, tmp_path, model=other, profile=None)
    made = read(other, ids(50), NexusCache(other, codec="exact", evict_ratio=0.0))
    refused(ConfigError, "made with another model than the one given", made, tmp_path)
    del other
    gc.collect()
    refused(ConfigError, "give model=", made, tmp_path, model=None)
    short = DynamicCache()
    for index, layer in enumerate(stock.layers[:2]):
        short.update(layer.keys, layer.values, index)
    refused(UnsupportedError, "other layers than this model", short, tmp_path)
    wide = DynamicCache()
    for index, layer in enumerate(stock.layers):
        x = layer.keys.reshape(1, 4, TOKENS, 8)
        wide.update(x, x, index)
    refused(UnsupportedError, "other layers than this model", wide, tmp_path)


def test_a_profile_of_other_shapes(stock: Any, tmp_path: Path) -> None:
    _, profile = case("llama")
    for shapes in ({0: (4, 8, 8), **dict.fromkeys((1, 2), (2, 16, 16))}, {0: (2, 16, 16)}):
        layers = {i: profile.layers[i] for i in shapes}
        wrong = replace(profile, shapes=shapes, layers=layers)
        refused(ProfileError, "storage profile", stock, tmp_path, profile=wrong)
    refused(ProfileError, "cannot read", stock, tmp_path, profile=tmp_path / "none")


def test_the_old_file_stays_if_the_new_one_is_refused(tmp_path: Path) -> None:
    model, profile = case("llama")
    cache = read(model, ids(TOKENS))
    save(cache, tmp_path / "p", model=model, profile=profile)
    before = (tmp_path / "p").read_bytes()
    cache.layers[2].values[0, 0, 50, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        save(cache, tmp_path / "p", model=model, profile=profile)
    assert (tmp_path / "p").read_bytes() == before
    assert nxq.Reader.open(before).meta["tokens"] == TOKENS
