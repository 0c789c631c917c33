"""What `save` writes, and what it refuses before anything is written."""

from __future__ import annotations

import gc
from array import array
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
    load,
    nxq,
    save,
)
from nexusquant.hf.cache import plain_cache
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.prefix.loading import open_prefix, prefix_tokens
from nexusquant.stores import DirectoryStore
from tests.hf.models import tiny
from tests.prefix.stored_cases import case, ids, model_of, pairs, read

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


def test_what_a_file_says(stock: Any, tmp_path: Path) -> None:
    model, profile = case("llama")
    steps: list[str] = []
    saved = save(
        stock, str(tmp_path / "new" / "p.nxq"), model=model, tokens=ids(TOKENS), profile=profile,
        embed_profile=False, report=steps.append,
    )  # fmt: skip
    assert saved.key == str(tmp_path / "new" / "p.nxq")
    assert steps == ["expected attention", *(f"layer {i} of 3" for i in (1, 2, 3))]
    with open_prefix(saved.key) as reader:
        meta = dict(reader.meta)
        assert 100 < meta.pop("step") + 240 < 240
        assert meta.pop("elements") == round(saved.ratio * saved.nbytes / 2)
        assert meta == {
            "codec": "entropy", "dtype": "float32", "fingerprint": fingerprint(model),
            "model_type": "llama", "page": 256, "profile": profile.digest, "starts": [0, 0, 0],
            "tokens": TOKENS, "version": 1,
        }  # fmt: skip
        assert reader.streams == {"tokens": 1, "layer.0": 2, "layer.1": 2, "layer.2": 2}
        assert prefix_tokens(reader) == ids(TOKENS)[0].tolist()
        reader.verify()


def test_sliding_layers_begin_later(tmp_path: Path) -> None:
    model, profile = case("gemma3")
    save(read(model, ids(TOKENS)), tmp_path / "p", model=model, profile=profile)
    with open_prefix(tmp_path / "p") as reader:
        assert reader.meta["starts"] == [TOKENS - 47, 0, TOKENS - 47]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_same_cache_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    model, profile = case(kind)
    for name, network in (("a", model), ("b", model_of(kind))):
        stock = read(network, ids(600))
        save(stock, tmp_path / name, model=network, tokens=ids(600)[0].tolist(), profile=profile)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_keys_in_a_store_follow_from_the_content(stock: Any, tmp_path: Path) -> None:
    model, profile = case("llama")
    store = DirectoryStore(tmp_path)

    def key(cache: Any = stock, **options: Any) -> str:
        return save(cache, store, **{"model": model, "tokens": ids(TOKENS), **options}).key

    first = key(profile=profile)
    assert first == key(profile=profile, embed_profile=False)
    others = [
        key(profile=profile, embed_profile=True),
        key(read(model, ids(TOKENS)[:, :50], read(model, ids(50, seed=8))), profile=profile),
        key(profile=profile, bits=3),
        key(read(model, ids(99)), profile=profile, tokens=ids(99)),
        key(profile=profile, tokens=ids(TOKENS, seed=9)),
        key(profile=profile, key="mine"),
    ]
    for quality in ("high", "max"):
        live = read(model, ids(TOKENS), NexusCache(model, quality))
        others += [key(live), key(live, codec="zstd")]
    assert len({first, *others}) == len(others) + 1
    assert others[5] == "mine"
    beside = {name for name in set(store.keys()) if name.startswith("profile-")}
    assert set(store.keys()) == {first, *others, *beside}
    assert f"profile-{profile.digest}.safetensors" in beside
    assert first.endswith(".nxq")
    assert len(first) == 36


def test_a_profile_in_the_file_is_enough(stock: Any, tmp_path: Path) -> None:
    model, profile = case("llama")
    for name, embed in (("with", True), ("without", False)):
        save(stock, tmp_path / name, model=model, profile=profile, embed_profile=embed)
    twin = model_of("llama")
    again = load(tmp_path / "with", twin)
    theirs = load(tmp_path / "without", twin, store_profile=profile)
    assert all(torch.equal(*pair) for pair in pairs(again, theirs))
    with pytest.raises(ProfileError, match=f"{profile.digest}'; it is not there. Give its"):
        load(tmp_path / "without", twin)


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


def test_token_ids_of_any_kind(stock: Any, tmp_path: Path) -> None:
    model, profile = case("llama")
    listed = ids(TOKENS)[0].tolist()
    for tokens in (listed, tuple(listed), ids(TOKENS), ids(TOKENS)[0].numpy(), array("q", listed)):
        save(stock, tmp_path / "p", model=model, profile=profile, tokens=tokens)
        with open_prefix(tmp_path / "p") as reader:
            assert prefix_tokens(reader) == listed


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


@pytest.mark.parametrize("size", [1e3, 1e5, 1e20, 3e38])
def test_huge_numbers(tmp_path: Path, size: float) -> None:
    """They are coded, however badly, or refused; never written as something else."""
    model, profile = case("llama")
    cache = read(model, ids(TOKENS))
    for token in (0, 50):
        cache.layers[1].keys[0, 0, token, 0] = size
    try:
        save(cache, tmp_path / "p", model=model, profile=profile, bits=3)
    except NonFiniteError:
        assert size > 1e3
        return
    again = load(tmp_path / "p", model, store_profile=profile)
    assert all(bool(torch.isfinite(x).all()) for pair in pairs(again, again) for x in pair)
    assert again.layers[1].keys[0, 0, 0, 0] == size
    assert float(again.layers[1].keys[0, 0, 50, 0]) == pytest.approx(size, rel=0.1)


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


def test_token_ids_of_several_sequences(tmp_path: Path) -> None:
    model, _ = case("llama")
    two = read(model, ids(80).view(2, 40), NexusCache(model))
    with pytest.raises(ConfigError, match="token ids are of one sequence"):
        save(two, tmp_path / "p", tokens=range(40))
    save(two, tmp_path / "p")
    assert load(tmp_path / "p", model).layers[0].batch_size == 2


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
