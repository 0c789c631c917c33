"""Codecs of blocks: what comes back, and that nothing else is taken for it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant.errors import ConfigError, FormatError, NonFiniteError
from nexusquant.vllm.blocks import BlockCodec, RawCodec
from nexusquant.vllm.codecs import CODECS, make_codec
from nexusquant.vllm.e8 import E8Codec

LAYERS, SHAPE = 3, (2, 32, 16)


def block(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sides = torch.randn(2, LAYERS, *SHAPE, generator=generator).to(dtype)
    return list(5 + sides[0]), list(sides[1])


def shapes(count: int = LAYERS) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    return [(SHAPE, SHAPE)] * count


def like(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_raw_keeps_every_bit(dtype: torch.dtype) -> None:
    given = block(dtype)
    given[0][0][0, 0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    codec = RawCodec()
    found = codec.decode(codec.encode(*given, 64), 64, shapes(), like(dtype))
    for x, y in zip(chain(*given), chain(*found), strict=True):
        assert y.dtype == dtype
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.7), (4, 0.13), (6, 0.04), (8, 0.012)])
def test_e8_comes_close(bits: int, limit: float) -> None:
    keys, values = block()
    codec = E8Codec(bits)
    blob = codec.encode(keys, values, 0)
    found = codec.decode(blob, 0, shapes(), like())
    for given, coded, centre in ((keys, found[0], 5.0), (values, found[1], 0.0)):
        for x, y in zip(given, coded, strict=True):
            assert (x - y).norm() < limit * (x - centre).norm()
    assert len(blob) < 2 * LAYERS * torch.Size(SHAPE).numel() * (bits + 2) / 8 + 1500


def test_e8_takes_zeros_and_other_dtypes() -> None:
    zeros = [torch.zeros(SHAPE, dtype=torch.bfloat16)] * LAYERS
    codec = E8Codec()
    keys, values = codec.decode(codec.encode(zeros, zeros, 0), 0, shapes(), like(torch.bfloat16))
    assert all(x.dtype == torch.bfloat16 for x in keys + values)
    assert all(x.abs().max() < 1e-30 for x in keys + values)


def test_e8_refuses_what_it_cannot_code() -> None:
    keys, values = block()
    keys[1][0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        E8Codec().encode(keys, values, 0)
    narrow = [torch.randn(2, 32, 12)]
    with pytest.raises(ConfigError, match="multiple of 8"):
        E8Codec().encode(narrow, narrow, 0)


EACH = pytest.mark.parametrize("codec", [RawCodec(), E8Codec()], ids=lambda codec: codec.name)


@EACH
def test_encoding_is_deterministic(codec: BlockCodec) -> None:
    assert codec.encode(*block(), 32) == codec.encode(*block(), 32)


@EACH
def test_damage_is_found(codec: BlockCodec) -> None:
    blob = codec.encode(*block(), 32)
    for at in range(0, len(blob), 997):
        damaged = bytearray(blob)
        damaged[at] ^= 4
        try:
            found = codec.decode(bytes(damaged), 32, shapes(), like())
        except FormatError:
            continue
        whole = codec.decode(blob, 32, shapes(), like())  # a byte between chunks
        for x, y in zip(chain(*found), chain(*whole), strict=True):
            assert torch.equal(x, y)
    for end in (0, 10, len(blob) // 2, len(blob) - 1):
        with pytest.raises(FormatError):
            codec.decode(blob[:end], 32, shapes(), like())


@EACH
def test_other_blocks_are_refused(codec: BlockCodec) -> None:
    blob = codec.encode(*block(), 32)
    with pytest.raises(FormatError, match="first_position"):
        codec.decode(blob, 64, shapes(), like())
    with pytest.raises(FormatError, match="shapes"):
        codec.decode(blob, 32, shapes(2), like())
    other = E8Codec(4) if codec.name == "e8" else E8Codec()
    with pytest.raises(FormatError, match="codec"):
        other.decode(blob, 32, shapes(), like())


def test_codecs_by_name() -> None:
    assert list(CODECS) == ["raw", "e8", "entropy"]
    assert [make_codec(name, {}).name for name in ("raw", "e8")] == ["raw", "e8"]
    assert make_codec("e8", {"bits": 5}).identity()["bits"] == 5
    with pytest.raises(ConfigError, match="raw, e8, entropy"):
        make_codec("zip", {})
    with pytest.raises(ConfigError, match="bit"):
        make_codec("e8", {"bit": 4})
    with pytest.raises(ConfigError, match="bits=9"):
        make_codec("e8", {"bits": 9})
    name: Any = ["e8"]
    with pytest.raises(ConfigError, match=r"codec \['e8'\]: must be one of"):
        make_codec(name, {})
    options: Any = ["bits"]
    with pytest.raises(ConfigError, match=r"codec_options=\['bits'\]: must be an object"):
        make_codec("e8", options)


@pytest.mark.parametrize("bits", [True, "8", 7.5, float("nan"), [8], None])
def test_rates_that_are_no_integers(bits: Any) -> None:
    with pytest.raises(ConfigError, match="the codec e8 has 1, 2"):
        make_codec("e8", {"bits": bits})


def test_a_rate_that_json_wrote_as_a_float_is_the_integer() -> None:
    keys = [torch.randn(2, 16, 64)]
    written, meant = make_codec("e8", {"bits": 8.0}), make_codec("e8", {"bits": 8})
    assert repr(written.identity()) == repr(meant.identity())
    assert written.encode(keys, keys, 0) == meant.encode(keys, keys, 0)
