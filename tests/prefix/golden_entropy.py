"""Golden files of codec "entropy": the model, its profile, a prefix."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from nexusquant import nxq
from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.profile import QueryMoments, StoreProfile, profile_from_bytes
from nexusquant.math.e8 import GROUP
from nexusquant.math.rope import RopeTable, Span
from nexusquant.prefix import coded
from nexusquant.prefix.decoded import decode_layers
from nexusquant.prefix.rotary import CachedLayer
from nexusquant.prefix.source import LayerSource
from nexusquant.profile import LayerProfile, Side
from tests.prefix.golden_parts import FINGERPRINT, noise, npz


def _quietly(step: str) -> None:
    """For `report`."""


TOKENS = 270
WINDOW = 40
BITS = 2.2
"""With the step that it gives, one group is just loud enough to be coded, another one just not."""
SHAPES = {0: (2, 16, 8), 1: (1, 8, 8), 2: (1, 8, 16)}
_OUTLIERS = {9: 25.0, TOKENS - 1: 2500.0}
"""Tokens that are longer than others: numbers without a symbol, in one draw and in two."""


def split_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE as Llama has it."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    return turned(q), turned(k)


def layers() -> dict[int, CachedLayer]:
    """With RoPE; without it and with a sliding window; with some dimensions rotated."""

    def layer(index: int, rotated: int, window: int | None = None) -> CachedLayer:
        table = RopeTable(split_halves) if rotated else None
        if table is not None:
            frequencies = 0.5 ** torch.arange(0, rotated // 2, dtype=torch.float32)
            table.spans = [Span(torch.zeros(1, 1, dtype=torch.int32), frequencies)]
        return CachedLayer(table, SHAPES[index], window, None, torch.device("cpu"), torch.float32)

    return {0: layer(0, 16), 1: layer(1, 0, WINDOW), 2: layer(2, 4)}


def _vectors(heads: int, tokens: int, dim: int, seed: int) -> Tensor:
    """(heads, tokens, dim) without RoPE: large and small directions, tokens like those before."""
    size = heads * dim
    y = noise(tokens, size, seed=seed)
    for t in range(1, tokens):
        y[t] += 0.75 * y[t - 1]
    mix = torch.eye(size) + noise(size, size, seed=size) / size
    spread = 2.0 ** (3 - 10 * torch.arange(size) / size)
    x = (y * spread) @ mix + 2 * noise(size, seed=3)
    return x.unflatten(-1, (heads, dim)).transpose(0, 1)


def store_profile() -> StoreProfile:
    """Of a model that has such vectors."""

    def side(heads: int, dim: int) -> Side:
        eye = torch.eye(dim).expand(heads, dim, dim).contiguous()
        ones = torch.ones(heads, dim // GROUP)
        return Side(eye, eye, torch.zeros(heads, dim), ones, torch.ones(heads), ones)

    def queries(heads: int, dim: int) -> QueryMoments:
        root = noise(2 * heads, dim, dim, seed=7) / 4
        return QueryMoments(noise(2 * heads, dim, seed=8) / 4, (root @ root.mT).bfloat16())

    return build_profile(
        {i: LayerProfile(side(h, k), side(h, v)) for i, (h, k, v) in SHAPES.items()},
        {
            i: [Sample(_vectors(h, 512, k, 20 + i), _vectors(h, 512, v, 30 + i))]
            for i, (h, k, v) in SHAPES.items()
        },
        {i: queries(h, k) for i, (h, k, _) in SHAPES.items()},
        FINGERPRINT, "tests/prefix/golden.py", 512,
    )  # fmt: skip


def embedded(reader: nxq.Reader) -> StoreProfile:
    """The storage profile in a file."""
    return profile_from_bytes(bytes(reader.read("profile", 0)))


def _sources() -> list[LayerSource]:
    found = []
    for index, layer in layers().items():
        heads, *dims = layer.shape
        start = 0 if layer.window is None else TOKENS - layer.window + 1
        keys, values = (
            _vectors(heads, TOKENS, dim, 40 + index + 10 * i) for i, dim in enumerate(dims)
        )
        for token, factor in _OUTLIERS.items():
            keys[:, token], values[:, token] = factor * keys[:, token], factor * values[:, token]
        both = layer.leave(keys[:, start:], start), values[:, start:]
        dtype = torch.bfloat16 if index == 2 else torch.float32
        found.append(LayerSource(*(x.to(dtype) for x in both), start))
    return found


def entropy_file() -> bytes:
    """Three layers, and the storage profile that they are coded with."""
    profile, held = store_profile(), _sources()
    with mock.patch.object(coded, "cached_layers", return_value=layers()):
        meta, streams = coded.encode_prefix(held, torch.nn.Module(), profile, BITS, _quietly)
    elements = sum(x.keys.numel() + x.values.numel() for x in held)
    meta |= {"elements": elements, "fingerprint": FINGERPRINT, "model_type": "none"}
    ids = np.arange(TOKENS, dtype="<u4").tobytes()
    return nxq.pack(meta, {"tokens": [ids], "profile": [profile.to_bytes()], **streams})


def entropy_files() -> dict[str, bytes]:
    """By name: a prefix, and the keys and values that it is decoded to."""
    data = entropy_file()
    arrays: dict[str, Any] = {}
    with nxq.Reader.open(data) as reader:
        decoded = decode_layers(reader, layers(), embedded(reader), _quietly)
    for index, layer in enumerate(decoded.layers):
        arrays |= {f"{index}.keys": layer.keys.numpy(), f"{index}.values": layer.values.numpy()}
    return {"entropy-v1.nxq": data, "entropy-v1.npz": npz(arrays)}
