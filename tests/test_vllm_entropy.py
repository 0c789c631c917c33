"""The storage codec for blocks: what comes back, what is refused, and which profile is taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, LlamaConfig, LlamaForCausalLM, SmolLM3Config

from nexusquant import nxq
from nexusquant.entropy.profile import StoreProfile
from nexusquant.errors import (
    ConfigError,
    FormatError,
    NonFiniteError,
    ProfileError,
    UnsupportedError,
)
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import default_store_path, save_store_profile
from nexusquant.vllm.blocks import Shape
from nexusquant.vllm.codecs import make_codec
from nexusquant.vllm.entropy import SINKS, EntropyCodec
from nexusquant.vllm.keys import Namespace
from nexusquant.vllm.profiles import Served
from nexusquant.vllm.rotary import check_rotation, frequencies, rotate, rows
from nexusquant.vllm.settings import Settings
from tests.entropy.cases import HEADS, KEY, LAYERS, VALUE, page, profile

TOKENS = 32
CONFIG = LlamaConfig(
    hidden_size=4 * KEY,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    num_hidden_layers=2,
    intermediate_size=32,
    vocab_size=64,
)
ROPE = frequencies(CONFIG)
SHAPES: list[tuple[Shape, Shape]] = [((HEADS, TOKENS, KEY), (HEADS, TOKENS, VALUE))] * len(LAYERS)
Sides = tuple[list[Tensor], list[Tensor]]


@pytest.fixture(scope="module")
def codec() -> EntropyCodec:
    return EntropyCodec(profile(), ROPE)


def block(first: int, dtype: torch.dtype = torch.float32) -> Sides:
    """As a model has it, with huge sinks where a sequence begins."""
    cos, sin = rows(ROPE, torch.arange(first, first + TOKENS))
    keys, values = [], []
    for layer in LAYERS:
        k, v = (x.clone() for x in page(TOKENS, layer + first))
        if first == 0:
            k[:, :SINKS] *= 1e4
        keys.append(rotate(k, cos, sin).to(dtype))
        values.append(v.to(dtype))
    return keys, values


def like(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("first", [0, 64])
@pytest.mark.parametrize(("bits", "limit"), [(2, 0.3), (5, 0.02), (8, 0.002)])
def test_comes_close(first: int, bits: float, limit: float) -> None:
    codec, given = EntropyCodec(profile(), ROPE, bits), block(first)
    blob = codec.encode(*given, first)
    found = codec.decode(blob, first, SHAPES, like())
    skip = SINKS if first == 0 else 0
    for x, y in zip(chain(*given), chain(*found), strict=True):
        assert y.shape == x.shape
        assert torch.equal(x[:, :skip], y[:, :skip]), "sinks are exact"
        rest = x[:, skip:]
        assert (rest - y[:, skip:]).norm() < limit * (rest - rest.mean(1, keepdim=True)).norm()
    elements = sum(x[:, skip:].numel() for x in chain(*given))
    exact = sum(x[:, :skip].nbytes for x in chain(*given))
    assert len(blob) < elements * (bits + 0.5) / 8 + exact + 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(codec: EntropyCodec, dtype: torch.dtype) -> None:
    given = block(32, dtype)
    found = codec.decode(codec.encode(*given, 32), 32, SHAPES, like(dtype))
    for x, y in zip(chain(*given), chain(*found), strict=True):
        assert y.dtype == dtype
        assert (x - y).float().norm() < 0.02 * x.float().norm()


def test_blocks_of_nothing_but_sinks(codec: EntropyCodec) -> None:
    short: Any = [tuple((heads, 3, dim) for heads, _, dim in both) for both in SHAPES]
    keys, values = ([x[:, :3] for x in side] for side in block(0))
    found = codec.decode(codec.encode(keys, values, 0), 0, short, like())
    for x, y in zip([*keys, *values], chain(*found), strict=True):
        assert torch.equal(x, y)


def test_headers_are_small(codec: EntropyCodec) -> None:
    blob = codec.encode(*block(32), 32)
    with nxq.Reader.open(blob) as reader:
        assert len(blob) - reader.size("page") < 500


def test_encoding_is_deterministic_and_other_blocks_are_refused(codec: EntropyCodec) -> None:
    blob = codec.encode(*block(32), 32)
    assert blob == codec.encode(*block(32), 32)
    with pytest.raises(FormatError, match="first_position"):
        codec.decode(blob, 64, SHAPES, like())
    with pytest.raises(FormatError, match="shapes"):
        codec.decode(blob, 32, SHAPES[:1], like())
    for other in (EntropyCodec(profile(), ROPE, 6), EntropyCodec(another(), ROPE)):
        with pytest.raises(FormatError, match="codec"):
            other.decode(blob, 32, SHAPES, like())


@pytest.mark.parametrize("first", [0, 32])
def test_damage_is_found(codec: EntropyCodec, first: int) -> None:
    blob = codec.encode(*block(first), first)
    whole = list(chain(*codec.decode(blob, first, SHAPES, like())))
    for at in range(0, len(blob), 97):
        damaged = bytearray(blob)
        damaged[at] ^= 4
        try:
            found = codec.decode(bytes(damaged), first, SHAPES, like())
        except FormatError:
            continue
        assert all(map(torch.equal, chain(*found), whole)), "a byte between chunks"
    for end in (0, 10, len(blob) // 2, len(blob) - 1):
        with pytest.raises(FormatError):
            codec.decode(blob[:end], first, SHAPES, like())


def test_what_cannot_be_coded_is_refused(codec: EntropyCodec) -> None:
    keys, values = block(32)
    with pytest.raises(ProfileError, match="another model"):
        codec.encode(keys[:1], values[:1], 32)
    values[1][0, 9, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        codec.encode(keys, values, 32)
    wrong: list[Any] = [0, 13, "5", True, float("nan")]
    for bits in wrong:
        with pytest.raises(ConfigError, match="bits="):
            EntropyCodec(profile(), ROPE, bits)


def another() -> StoreProfile:
    return replace(profile(), source="another text")


def test_profile_and_rate_are_in_the_namespace(codec: EntropyCodec) -> None:
    def seed(codec: EntropyCodec) -> bytes:
        return Namespace({"name": "m"}, "float32", "auto", TOKENS, codec.identity()).seed()

    told = codec.identity()
    assert told["profile"] == profile().digest
    others = EntropyCodec(another(), ROPE), EntropyCodec(profile(), ROPE, 5.5)
    assert len({seed(codec), *map(seed, others)}) == 3
    assert seed(codec) == seed(EntropyCodec(profile(), ROPE, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a model, and its fingerprint."""
    folder = tmp_path_factory.mktemp("model")
    made = LlamaForCausalLM(CONFIG)
    made.save_pretrained(folder)
    return folder, fingerprint(made)


def test_the_profile_is_found_given_or_missed(
    model: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, mine = model
    served = Served(str(folder), CONFIG)
    with pytest.raises(ConfigError, match=rf"{mine}.*calibrate MODEL --store"):
        make_codec("entropy", {}, served)
    own = replace(profile(), fingerprint=mine)
    assert save_store_profile(own) == default_store_path(mine)
    assert make_codec("entropy", {"bits": 4}, served).identity()["profile"] == own.digest
    assert not caplog.text
    given = save_store_profile(profile(), tmp_path / "given")
    found = make_codec("entropy", {"profile": str(given)}, served)
    assert found.identity()["profile"] == profile().digest
    assert "other weights" in caplog.text
    with pytest.raises(ProfileError, match="cannot read"):
        make_codec("entropy", {"profile": str(tmp_path / "none")}, served)
    with pytest.raises(ConfigError, match="profile=5: must be the path"):
        make_codec("entropy", {"profile": 5}, served)


def test_models_whose_files_are_not_here_need_a_path(tmp_path: Path) -> None:
    given = save_store_profile(profile(), tmp_path / "given")
    for name in (str(tmp_path / "no such folder"), str(tmp_path)):
        served = Served(name, CONFIG, download_dir=str(tmp_path / "hub"))
        with pytest.raises(ConfigError, match="has to be given"):
            make_codec("entropy", {}, served)
        assert make_codec("entropy", {"profile": str(given)}, served).name == "entropy"


def test_several_ranks_are_refused() -> None:
    for ranks in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}):
        with pytest.raises(UnsupportedError, match='Use "codec": "e8"'):
            make_codec("entropy", {}, Served("m", CONFIG, **ranks))
    with pytest.raises(ConfigError, match="say which"):
        make_codec("entropy", {})


class Unheard:
    """A config that transformers has no model for."""

    model_type = "unheard"

    def get_text_config(self) -> Unheard:
        return self


def test_other_rotations_are_refused() -> None:
    check_rotation(CONFIG, ROPE)
    interleaved = CohereConfig(hidden_size=64, num_attention_heads=4)
    for config, match in (
        (interleaved, "cohere rotates keys in another way"),
        (SmolLM3Config(), "in some layers"),
    ):
        with pytest.raises(UnsupportedError, match=rf'{match}.*Use "codec": "e8"'):
            make_codec("entropy", {}, Served("m", config))
    with pytest.raises(UnsupportedError, match="unheard rotates keys cannot be found out"):
        check_rotation(Unheard(), ROPE)


def test_a_profile_in_the_settings_chooses_the_codec() -> None:
    def codec_of(**given: Any) -> str:
        return Settings.read({"store": "/kv", **given}).codec

    assert codec_of(codec_options={"profile": "p"}) == "entropy"
    assert codec_of(codec_options={"bits": 4}) == "e8"
    assert codec_of(codec="e8", codec_options={"profile": "p"}) == "e8"
