"""What `load` reads, and how little of it; what it refuses."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nexusquant import (
    ConfigError,
    FormatError,
    NexusCache,
    ProfileError,
    StoreError,
    UnsupportedError,
    calibrate_store,
    load,
    nxq,
    save,
    save_store_profile,
)
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import find_store_profile
from nexusquant.prefix.loading import open_prefix, prefix_tokens
from nexusquant.stores import DirectoryStore
from tests.hf.models import tiny
from tests.nxq.cases import contents
from tests.prefix.stored_cases import case, ids, model_of, pairs, read, tokenizer

TOKENS = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the model "llama"."""
    model, profile = case("llama")
    path = tmp_path_factory.mktemp("prefix") / "p"
    save(
        read(model, ids(TOKENS)), path, model=model, tokens=ids(TOKENS), profile=profile,
        embed_profile=False,
    )  # fmt: skip
    return path.read_bytes()


def resealed(data: bytes, streams: dict[str, Any] | None = None, **meta: Any) -> bytes:
    """The file with other fields or streams; None removes."""
    old, chunks, _ = contents(nxq.Reader.open(data))
    new = {**old, **meta}
    parts = {**chunks, **(streams or {})}
    return nxq.pack(
        {name: value for name, value in new.items() if value is not None},
        {name: value for name, value in parts.items() if value is not None},
    )


def test_from_anywhere(data: bytes, tmp_path: Path) -> None:
    model, profile = case("llama")
    (tmp_path / "p").write_bytes(data)
    with DirectoryStore(tmp_path / "s") as store:
        store.put("p", data)
        places: list[tuple[Any, str | None]] = [
            (tmp_path / "p", None), (str(tmp_path / "p"), None), (data, None), (store, "p"),
            (bytearray(data), None), (memoryview(data), None), (io.BytesIO(data), None),
        ]  # fmt: skip
        found = [load(x, model, key=key, store_profile=profile) for x, key in places]
        assert all(torch.equal(*pair) for each in found for pair in pairs(each, found[0]))
        with pytest.raises(StoreError, match="has no q"):
            load(store, model, key="q")
        with pytest.raises(ConfigError, match="give the key of one"):
            load(store, model)
    with pytest.raises(ConfigError, match="key is for stores"):
        load(data, model, key="p")
    with pytest.raises(StoreError, match="cannot be opened"):
        load(tmp_path / "none", model)
    with pytest.raises(StoreError, match="home"):
        load("~no such user/p", model)
    with pytest.raises(ConfigError, match="NoneType is nothing to read"):
        load(None, model)
    with pytest.raises(UnsupportedError, match="expected a transformers model"):
        load(data, torch.nn.Linear(1, 1))


class Counting:
    """A source that knows what was read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.ranges = data, list[tuple[int, int]]()

    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return self.data[start:stop]


class CountingStore(DirectoryStore):
    """Knows what was asked for."""

    asked = 0

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        self.asked += 1
        return super()._read(key, start, stop)


def test_opening_reads_the_head_only(tmp_path: Path) -> None:
    model, profile = case("llama")
    cache = read(model, ids(4000))
    saved = save(cache, tmp_path / "p", model=model, profile=profile, tokens=ids(4000), bits=8)
    source = Counting((tmp_path / "p").read_bytes())
    reader = nxq.Reader.open(source)
    assert source.ranges == [(0, nxq.reader.FIRST_READ)]
    assert saved.nbytes > 4 * nxq.reader.FIRST_READ
    assert prefix_tokens(reader) == ids(4000)[0].tolist()
    assert sum(stop - start for start, stop in source.ranges[1:]) == 4 * 4000


def test_one_request_per_layer(data: bytes, tmp_path: Path) -> None:
    model, profile = case("llama")
    with CountingStore(tmp_path) as store:
        store.put("p", data)
        load(store, model, key="p", store_profile=profile)
        assert store.asked == 1 + 3


def test_a_file_that_changes_meanwhile(data: bytes, tmp_path: Path) -> None:
    model, profile = case("llama")
    with DirectoryStore(tmp_path) as store:
        store.put("p", data)
        reader = open_prefix(store, "p")
        store.put("p", resealed(data, {"layer.0": [b""] * 4}))
        with pytest.raises(FormatError, match="It has changed since it was opened"):
            reader.read("layer.2", 0)
        store.delete("p")
        with pytest.raises(StoreError, match="has no p"):
            reader.read("layer.2", 0)
    assert load(data, model, store_profile=profile).get_seq_length() == TOKENS


def test_other_models_and_profiles(data: bytes, tmp_path: Path) -> None:
    model, profile = case("llama")
    other = tiny(seed=1)
    with pytest.raises(
        UnsupportedError, match=rf"fingerprint is '{fingerprint(model)}' \('llama'\)"
    ):
        load(data, other)
    theirs = replace(profile, fingerprint=fingerprint(other))
    with pytest.raises(ProfileError, match="it is another model's"):
        load(data, model, store_profile=theirs)
    with pytest.raises(ProfileError, match=f"profile '{profile.digest}'; the one given"):
        load(data, model, store_profile=replace(profile, tokens=7))
    for wrong in (b"", b"no profile", theirs.to_bytes()):
        with pytest.raises(ProfileError, match=r"not a storage profile|another model's"):
            load(resealed(data, {"profile": [wrong]}), model_of("llama"))
    with pytest.raises(FormatError, match="none from 0"):
        load(resealed(data, {"profile": []}), model_of("llama"))


def test_profiles_that_are_found(data: bytes, tmp_path: Path) -> None:
    twin = model_of("llama")
    with pytest.raises(ProfileError, match="it is not there"):
        load(data, twin)
    path = save_store_profile(case("llama")[1], tmp_path / "profile")
    expected = load(data, twin, store_profile=path)
    save_store_profile(case("llama")[1])
    assert all(torch.equal(*pair) for pair in pairs(load(data, twin), expected))
    other = calibrate_store(twin, tokenizer, ["7"], tokens=512)  # in force from now on
    save_store_profile(other)
    assert find_store_profile(model_of("llama")).digest == other.digest
    assert all(torch.equal(*pair) for pair in pairs(load(data, twin), expected))


def test_without_token_ids(data: bytes) -> None:
    whole = nxq.Reader.open(resealed(data, {"tokens": None}))
    assert prefix_tokens(whole) is None
    for wrong in ([], [b""], [b"123"], [bytes(4 * TOKENS - 1)], [bytes(4 * TOKENS + 4)]):
        with pytest.raises(FormatError):
            prefix_tokens(nxq.Reader.open(resealed(data, {"tokens": wrong})))
    for tokens in (None, "600", 599, [600], True, 600.0):
        with pytest.raises(FormatError, match="token ids"):
            prefix_tokens(nxq.Reader.open(resealed(data, tokens=tokens)))


@pytest.mark.parametrize("codec", [None, "zip", 7, [], {}, "Entropy", "x" * 4000])
def test_codecs_that_are_not_known(data: bytes, codec: Any) -> None:
    model, profile = case("llama")
    with pytest.raises(FormatError, match="is not known: entropy, raw, zstd") as error:
        load(resealed(data, codec=codec), model, store_profile=profile)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("theirs", [None, 7, [], "\x1b[2J" + "x" * 4000])
def test_fingerprints_that_are_none(data: bytes, theirs: Any) -> None:
    with pytest.raises(UnsupportedError, match="is of another model") as error:
        load(resealed(data, fingerprint=theirs, model_type=theirs), case("llama")[0])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_live_files(tmp_path: Path) -> None:
    model, _ = case("llama")
    save(read(model, ids(60), NexusCache(model)), tmp_path / "p", tokens=ids(60))
    data = (tmp_path / "p").read_bytes()
    with pytest.raises(ConfigError, match=r"codec 'raw'.*leave them out"):
        load(data, model, quality="high")
    with pytest.raises(FormatError, match="other tokens than the cache"):
        load(resealed(data, tokens=61), model)
    with pytest.raises(ConfigError, match="quality"):
        load(data, model, quality="no such")


def test_qualities_that_are_none(data: bytes) -> None:
    model, profile = case("llama")
    with pytest.raises(ConfigError, match="no such"):
        load(data, model, quality="no such", store_profile=profile)
