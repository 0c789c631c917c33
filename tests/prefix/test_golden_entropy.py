"""Entropy-coded prefixes of every version of the codec are read as they always were."""

from __future__ import annotations

import io
import json
from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch

from nexusquant import FormatError, nxq
from nexusquant.entropy.layer import LayerCode
from nexusquant.entropy.symbols import decode, encode
from nexusquant.prefix import coded
from nexusquant.prefix.decoded import decode_layers
from nexusquant.prefix.loading import prefix_tokens
from tests.nxq.cases import contents
from tests.prefix.golden_entropy import TOKENS, embedded, layers
from tests.prefix.golden_parts import FOLDER
from tests.prefix.plain_reader import Layer, read_safetensors

VERSIONS = {1: "entropy-v1"}
LAYERS = range(3)


def data_of(version: int) -> bytes:
    return (FOLDER / f"{VERSIONS[version]}.nxq").read_bytes()


@lru_cache
def expected(version: int) -> dict[str, Any]:
    file = io.BytesIO((FOLDER / f"{VERSIONS[version]}.npz").read_bytes())
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@lru_cache
def plain(version: int, index: int) -> Layer:
    meta, streams, _ = contents(nxq.Reader.open(data_of(version)))
    return Layer(meta, streams["profile"][0], index, streams[f"layer.{index}"])


def assert_near(found: Any, wanted: Any) -> None:
    """Within 1e-4 of the token's largest number, or of 1: arithmetic in fp32."""
    assert found.shape == wanted.shape
    size = np.maximum(np.abs(wanted).max((0, 2), keepdims=True), 1)
    assert float((np.abs(found - wanted) / size).max()) < 1e-4


def test_every_version_that_can_be_read_has_files() -> None:
    assert coded.VERSION in VERSIONS
    assert {x.stem for x in FOLDER.glob("entropy-*")} == set(VERSIONS.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_reading(version: int) -> None:
    with nxq.Reader.open(data_of(version)) as reader:
        reader.verify()
        assert reader.meta["version"] == version
        assert prefix_tokens(reader) == list(range(TOKENS))
        found = decode_layers(reader, layers(), embedded(reader), lambda step: None)
    assert found.tokens == TOKENS
    assert [layer.start for layer in found.layers] == [0, 231, 0]
    for index in LAYERS:
        for side in ("keys", "values"):
            wanted = expected(version)[f"{index}.{side}"]
            assert_near(getattr(found.layers[index], side).numpy(), wanted)


@pytest.mark.parametrize("index", LAYERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_reader_from_the_text_alone(version: int, index: int) -> None:
    """Keys of the text's reader are rotated here: how is the model's, not the format's."""
    layer, found = layers()[index], plain(version, index)
    start = TOKENS - found.coded[0].shape[1]
    keys = layer.leave(torch.from_numpy(found.coded[0]).float(), start).numpy()
    assert_near(np.concatenate([found.sinks[0], keys], 1), expected(version)[f"{index}.keys"])
    values = np.concatenate([found.sinks[1], found.coded[1]], 1)
    assert_near(values, expected(version)[f"{index}.values"])


@pytest.mark.parametrize("index", LAYERS)
def test_writing(index: int) -> None:
    """The same points are the same words of the range coder. (Points of vectors that lie between
    two may differ among machines, and frames of zstandard among its versions.)"""
    with nxq.Reader.open(data_of(coded.VERSION)) as reader:
        _, *pages = map(
            bytes, reader.read_range(f"layer.{index}", 0, reader.streams[f"layer.{index}"])
        )
        profile, step = embedded(reader), reader.meta["step"]
    code, e = LayerCode(profile, index, step), plain(coded.VERSION, index).e
    for i, page in enumerate(pages):
        extra = torch.tensor(e[256 * i :][:256], dtype=torch.int16)
        classes = code.classes((extra - 4) * 6)
        points = decode(page, classes, profile.tables)
        assert encode(*points, classes, profile.tables) == page, (
            "the bytes of the codec changed: that takes a new version, see docs/FORMAT.md"
        )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_profile_is_what_the_text_says(version: int) -> None:
    with nxq.Reader.open(data_of(version)) as reader:
        raw = bytes(reader.read("profile", 0))
        assert reader.meta["profile"] == blake2b(raw, digest_size=16).hexdigest()
        assert embedded(reader).digest == reader.meta["profile"]
    tensors, metadata = read_safetensors(raw)
    names = {x.split(".", 1)[1] for x in tensors if x[0].isdigit()}
    fields = {"forward", "scale", "mean", "decay", "level", "group"}
    queries = {"query.mean", "query.covariance"}
    assert names == {f"{s}.{x}" for s in ("key", "value") for x in fields} | queries
    shapes = {x: tensors[x].shape for x in tensors if not x[0].isdigit()}
    wanted = {"tables.values": (2, 16, 2, 81), "tables.cosets": (2, 16, 2), "rates": (25,)}
    assert shapes == wanted
    assert set(json.loads(metadata["nexusquant-store"])) == {
        "format", "fingerprint", "source", "tokens", "shapes",
    }  # fmt: skip


def test_the_files_hold_what_is_rare() -> None:
    """Or else they would prove little."""
    found = [plain(1, index) for index in LAYERS]
    assert [layer.dtype for layer in found] == [0, 0, 1]
    assert [len(layer.pages) for layer in found] == [2, 1, 2]
    assert any(count < len(x["group"][0]) for x, count in found[0].side)  # some are not coded
    seen = sum((page for layer in found for page in layer.pages), Counter[str]())
    wanted = {"drop 0, parity 0", "drop 0, parity 1", "drop 1, parity 2", "drop 3, parity 2"}
    assert {"escaped", "far"} | wanted <= set(seen)
    assert len(set(found[0].e)) > 2


@pytest.mark.parametrize("version", [0, max(VERSIONS) + 1, None, "1"])
def test_other_versions_are_refused(version: Any) -> None:
    meta, streams, _ = contents(nxq.Reader.open(data_of(coded.VERSION)))
    with nxq.Reader.open(nxq.pack({**meta, "version": version}, streams)) as reader:
        profile = embedded(reader)
        with pytest.raises(FormatError, match="version"):
            decode_layers(reader, layers(), profile, lambda step: None)
