"""The files of tests/golden/prefix, and `python -m tests.prefix.golden` to add those of a version.

Files are never made again: who reads them otherwise than what lies beside them breaks the prefixes
of all users. A codec that changes its bytes, or what they mean, gets a new version, with new files.
Nothing here is random or comes from a library, as the tests make the same models, not the files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nexusquant import CompressionConfig, NexusCache, nxq, save
from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.profile import QueryMoments, StoreProfile, profile_from_bytes
from nexusquant.hf.snapshot import Snapshot
from nexusquant.math.e8 import GROUP
from nexusquant.math.rope import RopeTable, Span
from nexusquant.prefix import coded
from nexusquant.prefix.decoded import decode_layers
from nexusquant.prefix.payloads import PAYLOADS
from nexusquant.prefix.rotary import CachedLayer
from nexusquant.prefix.source import LayerSource
from nexusquant.profile import LayerProfile, Side

FOLDER = Path(__file__).parents[1] / "golden" / "prefix"
FINGERPRINT = "900d900d900d900d"


def noise(*shape: int, seed: int = 0) -> Tensor:
    """fp32 of a bell curve with variance 1, the same everywhere: integers, scaled once."""
    at = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 4 + seed * 1_000_003
    total = torch.zeros_like(at)
    for i in range(4):
        x = ((at + i) * 2_654_435_761) & 0xFFFF_FFFF
        x = ((x ^ (x >> 15)) * 739_982_445) & 0xFFFF_FFFF
        total += ((x ^ (x >> 12)) & 0xFFFF) - 0x8000
    return (total.float() / (1 << 15) * 0.8660254).view(shape)


def _quietly(step: str) -> None:
    """For `report`."""


# -- codec "entropy"

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


# -- codecs "raw", "zstd", "zstd+delta"

PROMPT, PADDING, TAIL, MORE = 140, 30, 2, 3
"""Tokens of the prompt; of the second row not there; read after it and after loading, one by one:
too few for any to be compressed."""


def model() -> Any:
    """Two layers; weights without a random number, which differ among versions of PyTorch."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=None,
            tie_word_embeddings=False, rope_theta=10_000.0,
        )
    ).eval()  # fmt: skip
    for i, (name, x) in enumerate(sorted(made.named_parameters())):
        x.data = torch.ones_like(x) if "norm" in name else noise(*x.shape, seed=i) / 4
        if "k_proj" in name:  # the second head's keys are longer
            x.data[8:] *= 2
    return made


def same_fingerprint() -> AbstractContextManager[Any]:
    """Every model has `FINGERPRINT`: of the same weights it is another where another version of
    transformers has other fields in their config."""
    return mock.patch("nexusquant.hf.fingerprint._digest", return_value=FINGERPRINT)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, tokens) ids."""
    return (noise(batch, tokens, seed=seed) * 1000).long() % 62 + 2


@torch.no_grad()
def read(owner: Any, cache: Any, begin: int, stop: int) -> np.ndarray[Any, Any]:
    """Logits of tokens `begin` to `stop` - 1: the prompt at once, others one by one."""
    batch = 1 if "klt" in cache.config.transform else 2
    ids, mask = prompt(PROMPT + TAIL + MORE, batch), torch.ones(batch, PROMPT + TAIL + MORE).long()
    mask[1:, :PADDING] = 0
    logits = []
    for first in [x for x in range(begin, stop) if x == begin or x >= PROMPT]:
        last = PROMPT if first < PROMPT else first + 1
        new = (ids * mask)[:, first:last]
        logits.append(owner(new, cache=cache, attention_mask=mask[:, :last]).logits)
    return torch.cat(logits, 1).numpy()


def without_profile(owner: Any) -> NexusCache:
    """Two rows, heads that keep different numbers of tokens."""
    settings: dict[str, Any] = {"head_safeguard": 0.1, "scorer": "key_norm", "evict_ratio": 0.5}
    return NexusCache(owner, CompressionConfig(transform="hadamard", **settings))


def with_profile(owner: Any) -> NexusCache:
    """One row, after a prompt that was long enough to build the model's profile."""
    with torch.no_grad():
        owner(prompt(500, seed=1), cache=NexusCache(owner))
    return NexusCache(owner, CompressionConfig(evict_ratio=0.3, key_bits=3, value_bits=3))


LIVE: dict[str, Callable[[Any], NexusCache]] = {
    "without-profile": without_profile,
    "with-profile": with_profile,
}


@torch.no_grad()
def held(cache: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Keys and values of all layers, zeros where tokens are gone, and which those are."""
    found = {}
    for index, layer in enumerate(cache.layers):
        tail = layer.tail
        seen = Snapshot(layer, layer.stored, tail.keys, tail.values, layer.tail_start, 0, 0)
        for which, side in enumerate(("keys", "values")):
            whole, missing = seen.filled(which)
            gone = torch.zeros(whole.shape[:3]) if missing is None else missing
            found |= {f"{index}.{side}": whole.numpy(), f"{index}.gone": gone.bool().numpy()}
    return found


def goes_on(owner: Any, cache: Any) -> np.ndarray[Any, Any]:
    """Logits of the tokens that follow what is in the files."""
    return read(owner, cache, PROMPT + TAIL, PROMPT + TAIL + MORE)


def saved(cache: Any, owner: Any, codec: str) -> bytes:
    """The file of a cache; the profile is in that of "raw"."""
    alone = len(cache.layers[0].tail.keys) == 1
    ids = prompt(PROMPT + TAIL + MORE)[:, : PROMPT + TAIL] if alone else None
    with TemporaryDirectory() as folder:
        path, embed = Path(folder) / "p", codec == "raw"
        save(cache, path, model=owner, tokens=ids, codec=codec, embed_profile=embed)
        return path.read_bytes()


def live_files(kind: str) -> dict[str, bytes]:
    """By name: a prefix per codec, what they hold, and what comes of it."""
    with same_fingerprint():
        owner = model()
        cache = LIVE[kind](owner)
        read(owner, cache, 0, PROMPT + TAIL)
        files = {f"live-v1-{kind}-{codec}.nxq": saved(cache, owner, codec) for codec in PAYLOADS}
        arrays = held(cache)
        arrays["logits"] = goes_on(owner, cache)
    return files | {f"live-v1-{kind}.npz": _npz(arrays)}


# -- all of them


def _npz(arrays: dict[str, Any]) -> bytes:
    """Of fp32 numbers the first 16 bits of the fraction: the tests ask for no more."""
    few = {
        name: (x.view(np.int32) & -128).view(np.float32) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, **few)
    return file.getvalue()


def entropy_files() -> dict[str, bytes]:
    """By name: a prefix, and the keys and values that it is decoded to."""
    data = entropy_file()
    arrays: dict[str, Any] = {}
    with nxq.Reader.open(data) as reader:
        decoded = decode_layers(reader, layers(), embedded(reader), _quietly)
    for index, layer in enumerate(decoded.layers):
        arrays |= {f"{index}.keys": layer.keys.numpy(), f"{index}.values": layer.values.numpy()}
    return {"entropy-v1.nxq": data, "entropy-v1.npz": _npz(arrays)}


def add_missing() -> None:
    """Write the files that are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = entropy_files()
    for kind in LIVE:
        files |= live_files(kind)
    for name, data in files.items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)


if __name__ == "__main__":
    add_missing()
