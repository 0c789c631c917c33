"""What `save` writes."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from nexusquant import (
    ConfigError,
    NexusCache,
    NonFiniteError,
    ProfileError,
    load,
    save,
)
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.prefix.loading import open_prefix, prefix_tokens
from nexusquant.stores import DirectoryStore
from tests.prefix.stored_cases import case, ids, model_of, pairs, read

TOKENS = 100


@pytest.fixture(scope="module")
def stock() -> Any:
    return read(case("llama")[0], ids(TOKENS))


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


def test_token_ids_of_any_kind(stock: Any, tmp_path: Path) -> None:
    model, profile = case("llama")
    listed = ids(TOKENS)[0].tolist()
    for tokens in (listed, tuple(listed), ids(TOKENS), ids(TOKENS)[0].numpy(), array("q", listed)):
        save(stock, tmp_path / "p", model=model, profile=profile, tokens=tokens)
        with open_prefix(tmp_path / "p") as reader:
            assert prefix_tokens(reader) == listed


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


def test_token_ids_of_several_sequences(tmp_path: Path) -> None:
    model, _ = case("llama")
    two = read(model, ids(80).view(2, 40), NexusCache(model))
    with pytest.raises(ConfigError, match="token ids are of one sequence"):
        save(two, tmp_path / "p", tokens=range(40))
    save(two, tmp_path / "p")
    assert load(tmp_path / "p", model).layers[0].batch_size == 2
