"""Entropy-coded files that can be changed at will, and what must be true of reading them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import zstandard

from nexusquant import FormatError, ProfileError, UnsupportedError, nxq, save
from nexusquant.prefix.decoded import Decoded, decode_layers
from nexusquant.prefix.loading import prefix_tokens
from nexusquant.prefix.rotary import CachedLayer, cached_layers
from tests.nxq.cases import contents
from tests.prefix.stored_cases import case, ids, read

Meta = dict[str, Any]
Streams = dict[str, list[bytes]]
KINDS = ("llama", "gemma3", "bfloat16")
REFUSED = FormatError, ProfileError, UnsupportedError


@once
def layers_of(kind: str) -> dict[int, CachedLayer]:
    return cached_layers(case(kind)[0])


@once
def small(kind: str, tokens: int = 300) -> bytes:
    """A file with its token ids: two pages in every layer that has no window."""
    model, profile = case(kind)
    cache = read(model, ids(tokens))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        save(
            cache, path, model=model, tokens=ids(tokens), profile=profile, bits=0.5,
            embed_profile=False,
        )  # fmt: skip
        return path.read_bytes()


def parts(data: bytes) -> tuple[Meta, Streams]:
    return contents(nxq.Reader.open(data))[:2]


def decoded(data: bytes, kind: str) -> Decoded:
    """Everything of a file, without a model."""
    with nxq.Reader.open(data) as reader:
        prefix_tokens(reader)
        return decode_layers(reader, layers_of(kind), case(kind)[1], lambda step: None)


def same(one: Decoded, other: Decoded) -> bool:
    return one.tokens == other.tokens and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one.layers, other.layers, strict=True)
        for name in ("keys", "values")
    )


def survives(data: bytes, kind: str) -> bool:
    """Whether it was taken: then its numbers are finite and as many as its header says."""
    why = ""
    try:
        found = decoded(data, kind)
    except REFUSED as error:
        why = str(error)
    assert why.isprintable()
    assert len(why) < 600
    if why:
        return False
    meta = parts(data)[0]
    assert found.tokens == meta["tokens"]
    for index, layer in layers_of(kind).items():
        source = found.layers[index]
        heads, *dims = layer.shape
        assert source.start == meta["starts"][index]
        for x, dim in zip((source.keys, source.values), dims, strict=True):
            assert x.shape == (heads, found.tokens - source.start, dim)
            assert x.dtype == layer.dtype
            assert bool(torch.isfinite(x).all())
    return True


NUMBERS: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 255, 256, 257, 299, 301, 512, 1 << 16, 1 << 18,
    (1 << 18) + 1, 1 << 31, (1 << 53) - 1, 1 - (1 << 53), 0.0, 0.5, 300.0, 1e300, "", "300", "x",
    [], [0], [0, 0, 0], [0, 0, 0, 0], [[]], {}, {"a": 1},
)  # fmt: skip


def lie(kind: str, source: random.Random) -> bytes:
    """A file with right digests, of which some is not right."""
    meta, streams = parts(small(kind))
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        change = source.choice((_field, _field, _start, _first, _page, _page, _chunks))
        change(meta, streams, source)
    return nxq.pack(meta, streams)


def _field(meta: Meta, streams: Streams, source: random.Random) -> None:
    name = source.choice(("tokens", "starts", "step", "page", "profile", "dtype", "codec", "new"))
    old = meta.get(name)
    near = _near(old, 1, 24)
    if source.random() < 0.1:
        meta.pop(name, None)
    else:
        meta[name] = source.choice([*near, *near, *NUMBERS])


def _near(old: Any, *apart: int) -> list[int]:
    """Integers close to this one, if it is one."""
    if type(old) is not int or abs(old) > 1 << 52:
        return []
    return [old + sign * d for d in apart for sign in (-1, 1)]


def _start(meta: Meta, streams: Streams, source: random.Random) -> None:
    starts = meta.get("starts")
    if isinstance(starts, list) and starts:
        at = source.randrange(len(starts))
        near = _near(starts[at], 1)
        starts[at] = source.choice([*near, *near, *NUMBERS])


def _first(meta: Meta, streams: Streams, source: random.Random) -> None:
    """Its parts: a byte for the dtype, sinks, steps."""
    chunk = bytearray(_layer(streams, source)[0])
    what = source.randrange(4)
    if what == 0:
        chunk[0:1] = bytes(
            [source.randrange(256) if source.random() < 0.5 else source.randrange(4)]
        )
    elif what == 1 and len(chunk) > 1:  # sinks, or the frame
        at = source.randrange(1, len(chunk))
        chunk[at : at + 2] = source.choice((b"\xff\x7f", b"\x00\xfc", source.randbytes(2)))
    elif what == 2:
        chunk[source.randrange(len(chunk) + 1) :] = source.randbytes(source.randrange(20))
    else:  # other steps
        at = bytes(chunk).find(zstandard.FRAME_HEADER)
        count = source.choice((0, 1, 296, 299, 300, 47, 48, 255))
        steps = bytes(source.randrange(14) for _ in range(count))
        chunk[max(at, 0) :] = zstandard.ZstdCompressor(
            write_content_size=source.random() < 0.8
        ).compress(steps)
    _replace(streams, source, 0, bytes(chunk))


def _page(meta: Meta, streams: Streams, source: random.Random) -> None:
    layer = _layer(streams, source)
    at = source.randrange(len(layer))
    chunk = bytearray(layer[at])
    what = source.randrange(6)
    if what == 0:
        chunk = bytearray(source.randbytes(4 * source.randrange(400)))
    elif what == 1:
        del chunk[source.randrange(len(chunk) + 1) :]
    elif what == 2:
        del chunk[4 * source.randrange(len(chunk) // 4 + 1) :]
    elif what == 3:
        chunk += source.randbytes(source.choice((1, 4, 400)))
    elif what == 4:
        chunk = bytearray(source.choice(_layer(streams, source)))
    else:
        for _ in range(source.randrange(1, 20)):
            if chunk:
                chunk[source.randrange(len(chunk))] = source.randrange(256)
    layer[at] = bytes(chunk)


def _chunks(meta: Meta, streams: Streams, source: random.Random) -> None:
    name = source.choice([x for x in streams if x.startswith("layer")])
    what = source.randrange(5)
    if what == 0:
        del streams[name]
    elif what == 1:
        streams[name].append(source.choice((b"", b"x", *streams[name][:1])))
    elif what == 2:
        streams[name] = streams[name][: source.randrange(len(streams[name]) + 1)]
    elif what == 3:
        source.shuffle(streams[name])
    else:
        streams[source.choice(("tokens", "layer.7", "new"))] = [
            source.randbytes(source.randrange(9))
        ]
    if not any(x.startswith("layer") and streams[x] for x in streams):
        streams["layer.0"] = [b"x"]


def _layer(streams: Streams, source: random.Random) -> list[bytes]:
    return source.choice([x for name, x in streams.items() if name.startswith("layer") and x])


def _replace(streams: Streams, source: random.Random, at: int, chunk: bytes) -> None:
    _layer(streams, source)[at] = chunk


def bytewise(data: bytes, count: int, source: random.Random) -> Iterator[bytes]:
    """The file with one byte changed, again and again."""
    for _ in range(count):
        changed = bytearray(data)
        at = source.randrange(len(data))
        changed[at] ^= source.randrange(1, 256)
        yield bytes(changed)
