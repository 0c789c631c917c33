"""Compressed caches from files of every version are the same, and go on the same."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusquant import ProfileError, load, nxq
from nexusquant.prefix import live
from nexusquant.prefix.payloads import PAYLOADS
from tests.nxq.cases import contents
from tests.prefix.golden_live import LIVE, goes_on, held, model, same_fingerprint, saved
from tests.prefix.golden_parts import FOLDER
from tests.prefix.plain_reader import read_safetensors

VERSIONS = (1,)
CASES = [(v, kind, codec) for v in VERSIONS for kind in LIVE for codec in PAYLOADS]


@pytest.fixture(autouse=True)
def fingerprints() -> Iterator[None]:
    """Those of the files."""
    with same_fingerprint():
        yield


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The file of the profile of "with-profile"."""
    path = tmp_path / "profile.safetensors"
    path.write_bytes(parts(data_of(1, "with-profile", "raw"))[1]["profile"][0])
    return path


def data_of(version: int, kind: str, codec: str) -> bytes:
    return (FOLDER / f"live-v{version}-{kind}-{codec}.nxq").read_bytes()


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    with nxq.Reader.open(data) as reader:
        reader.verify()
        return contents(reader)[:2]


def loaded(owner: Any, version: int, kind: str, codec: str, profile: Path) -> Any:
    """The profile is given where it is not in the file."""
    given = profile if kind == "with-profile" and codec != "raw" else None
    return load(data_of(version, kind, codec), owner, profile=given)


def test_every_version_that_can_be_read_has_files() -> None:
    assert live.VERSION in VERSIONS
    wanted = {f"live-v{v}-{kind}-{codec}.nxq" for v, kind, codec in CASES}
    assert {x.name for x in FOLDER.glob("live-*.nxq")} == wanted


@pytest.mark.parametrize(("version", "kind", "codec"), CASES)
def test_reading(version: int, kind: str, codec: str, profile: Path) -> None:
    """Tokens within 1e-4, arithmetic in fp32, and the logits of those that follow."""
    owner = model()
    cache = loaded(owner, version, kind, codec, profile)
    file = io.BytesIO((FOLDER / f"live-v{version}-{kind}.npz").read_bytes())
    with np.load(file, allow_pickle=False) as arrays:
        expected = dict(arrays)
    found = held(cache)
    found["logits"] = goes_on(owner, cache)
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        if wanted.dtype == bool:
            assert np.array_equal(found[name], wanted)
        # What is decoded behind it waits in 16 bits, not as when these were written.
        atol = 1e-3 if name == "logits" else 1e-4
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(("version", "kind", "codec"), CASES)
def test_writing(version: int, kind: str, codec: str, profile: Path) -> None:
    """All codecs hold the same bits, which "raw" writes as they are: codes, slots, the rest."""
    owner = model()
    cache = loaded(owner, version, kind, codec, profile)
    meta, streams = parts(saved(cache, owner, "raw"))
    wanted, chunks = parts(data_of(live.VERSION, kind, "raw"))
    assert streams == chunks, (
        "the bytes of live files changed: that takes a new version, see docs/FORMAT.md"
    )
    # A later version has more settings, whose defaults are what was done before.
    assert meta["live"]["config"].items() >= wanted["live"].pop("config").items()
    del meta["live"]["config"]
    assert meta == wanted


def test_codecs_differ() -> None:
    """Some frames are smaller, some differences differ: or else the files would prove little."""
    for kind in LIVE:
        raw, zstd, delta = (parts(data_of(1, kind, codec))[1]["layer.0"] for codec in PAYLOADS)
        assert len(raw) == len(zstd) == len(delta)
        assert any(len(a) > len(b) for a, b in zip(raw, zstd, strict=True))
        assert any(a != b for a, b in zip(zstd, delta, strict=True))


def test_the_digest_of_a_profile_is_what_the_text_says() -> None:
    meta, streams = parts(data_of(1, "with-profile", "raw"))
    tensors, metadata = read_safetensors(streams["profile"][0])
    header = json.loads(metadata["nexusquant"])
    digest = blake2b(digest_size=16)
    for i, r in sorted(header["inverse_residual"].items(), key=lambda x: int(x[0])):
        digest.update(f"layer {i} {float(r)!r} ".encode())
        for s in ("key", "value"):
            for name in ("forward", "inverse", "mean", "variance", "weight", "coherence"):
                x = tensors.pop(f"{i}.{s}.{name}")
                assert x.dtype == np.float32
                digest.update(f"{s} {name} {x.shape} ".encode() + x.tobytes())
    assert digest.hexdigest() == meta["live"]["profile"]
    assert (tensors, header["format"]) == ({}, 2)


def test_another_profile_is_no_substitute() -> None:
    with pytest.raises(ProfileError, match="profile"):
        load(data_of(1, "with-profile", "zstd"), model())
