"""Time of the storage codec, beside zstd and int8 of the same run.

    python -m benchmarks.storage_speed
    python -m benchmarks.storage_speed --model MODEL --bits 1 --bits 2 --json out.json

MB of fp16 keys and values per second of one core (CPU time, medians). Without a model, vectors are
made up: spectra that fall like those of real layers, each token half of the one before. With one,
they are its cache of a text, keys as rotated, and the profile is of another text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import zstandard
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from benchmarks.speed import report
from nexusquant.demo import calibration_text, demo_text
from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.layer import PAGE, LayerCode
from nexusquant.entropy.profile import OCTAVE, QueryMoments, StoreProfile
from nexusquant.hf.cache_names import cache_argument
from nexusquant.kernels import operator_for
from nexusquant.kernels.warmup import warm_up
from nexusquant.loading import load_model
from nexusquant.math.e8 import GROUP
from nexusquant.profile import LayerProfile, Side
from nexusquant.progress import kernel_report, progress_steps

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_show_locals=False)
_FLOOR = 1e-3
"""Variance of the last coordinate over that of the first, about what real layers have."""


@dataclass(frozen=True)
class Way:
    """One way to store a layer.

    Attributes:
        name: for people.
        encode: number and vectors of a layer to byte strings.
        decode: the same number, bytes and shapes back to vectors.
    """

    name: str
    encode: Callable[[int, Sample], list[bytes]]
    decode: Callable[[int, list[bytes], Sample], object]


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Hub id or model folder; made up without.")] = "",
    bits: Annotated[list[float] | None, typer.Option(help="Bits per element.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a layer.")] = 2048,
    heads: Annotated[int, typer.Option(min=1, help="KV heads, if made up.")] = 4,
    dim: Annotated[int, typer.Option(min=8, help="Of a head, if made up.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers, evenly spaced.")] = 3,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Time of encoding and decoding at some rates."""
    torch.set_num_threads(1)
    with progress_steps() as progress:
        warm_up([], storage=True, progress=kernel_report(progress))
    with torch.inference_mode():
        if model:
            known, samples = _of_model(model, tokens, layers)
        else:
            known, samples = (
                [_made_up(tokens, heads, dim, text, layer) for layer in range(layers)]
                for text in (1, 2)
            )
        profile = _profile(known)
        rates = bits or (1.0, 1.3, 1.6, 6.0)
        ways = [_zstd(), _int8(), *(_coded(profile, x, e) for x in rates for e in (False, True))]
        rows = [_measured(way, samples, repeat) for way in ways]
    shape = f"{len(samples)} layers, (heads, tokens, dim) {tuple(samples[0].key.shape)}"
    operator = operator_for(torch.device("cpu")).name
    table = Table("way", title=f"{model or 'made up'}: {shape}; {operator}, one core")
    for column in ("bits", "encode MB/s", "decode MB/s"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = f"{row['bits']:.2f}", *(f"{row[key]:.1f}" for key in ("encode", "decode"))
        table.add_row(row["way"], *cells)
    report(table, {"model": Path(model).name, "operator": operator, "rows": rows}, json_file)


def _measured(way: Way, samples: list[Sample], repeat: int) -> dict[str, Any]:
    """Bits per element and MB/s of all layers together."""
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for run in range(repeat + 1):
        start = time.process_time()
        coded = [way.encode(*x) for x in enumerate(samples)]
        middle = time.process_time()
        for index, (data, sample) in enumerate(zip(coded, samples, strict=True)):
            way.decode(index, data, sample)
        if run:  # the first one makes tables
            times["encode"].append(middle - start)
            times["decode"].append(time.process_time() - middle)
    elements = sum(x.key.numel() + x.value.numel() for x in samples)
    size = sum(len(data) for layer in coded for data in layer)
    speed = {key: 2e-6 * elements / median(x) for key, x in times.items()}
    return {"way": way.name, "bits": 8 * size / elements, **speed}


def _coded(profile: StoreProfile, bits: float, each: bool) -> Way:
    """Our codec; `each`: with steps that differ from token to token."""

    def extra_of(count: int) -> Tensor:
        turns = torch.arange(count) * 7 % 13 - 4 if each else torch.zeros(count)
        return (turns * (OCTAVE // 2)).short()

    def encode(index: int, sample: Sample) -> list[bytes]:
        extra = extra_of(sample.key.shape[1])
        return LayerCode(profile, index, step).encode(sample.key, sample.value, extra)

    def decode(index: int, data: list[bytes], sample: Sample) -> object:
        count = sample.key.shape[1]
        counts = [min(PAGE, count - at) for at in range(0, count, PAGE)]
        return LayerCode(profile, index, step).decode([*data], counts, extra_of(count))

    step = profile.step_for(bits, extra_of(260))
    return Way(f"codec, {bits:g} bits" + (", own steps" if each else ""), encode, decode)


def _zstd() -> Way:
    """What a general compressor makes of fp16."""
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

    def encode(index: int, sample: Sample) -> list[bytes]:
        return [compressor.compress(x.half().numpy()) for x in (sample.key, sample.value)]

    def decode(index: int, data: list[bytes], sample: Sample) -> object:
        return [
            torch.frombuffer(bytearray(decompressor.decompress(x)), dtype=torch.float16).float()
            for x in data
        ]

    return Way("fp16, zstd 3", encode, decode)


def _int8() -> Way:
    """Rounded with a scale per vector, then compressed."""
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

    def encode(index: int, sample: Sample) -> list[bytes]:
        out = []
        for x in (sample.key, sample.value):
            scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            out += [compressor.compress((x / scale).round().to(torch.int8).numpy())]
            out += [scale.half().numpy().tobytes()]
        return out

    def decode(index: int, data: list[bytes], sample: Sample) -> object:
        out = []
        for x, rounded, scales in zip(
            (sample.key, sample.value), data[::2], data[1::2], strict=True
        ):
            n = torch.frombuffer(bytearray(decompressor.decompress(rounded)), dtype=torch.int8)
            scale = torch.frombuffer(bytearray(scales), dtype=torch.float16)
            out.append(n.view(x.shape) * scale.float().view(*x.shape[:2], 1))
        return out

    return Way("int8, zstd 3", encode, decode)


def _made_up(tokens: int, heads: int, dim: int, text: int, layer: int) -> Sample:
    """Keys and values of one text, all heads mixed."""
    sides = []
    for side in (0, 1):
        mixer = torch.Generator().manual_seed(2 * layer + side)
        mix = torch.linalg.qr(torch.randn(heads * dim, heads * dim, generator=mixer))[0]
        source = torch.Generator().manual_seed(1000 * text + 2 * layer + side)
        y = torch.randn(tokens, heads * dim, generator=source)
        for t in range(1, tokens):
            y[t] = 0.5 * y[t - 1] + 0.75**0.5 * y[t]
        spread = torch.logspace(0, math.log10(_FLOOR) / 2, heads * dim)
        x = ((y * spread) @ mix.T).half().float()
        sides.append(x.unflatten(-1, (heads, dim)).transpose(0, 1).contiguous())
    return Sample(*sides)


def _of_model(name: str, tokens: int, count: int) -> tuple[list[Sample], list[Sample]]:
    """Some layers of the model's caches of two texts."""
    loaded, tokenizer = load_model(name, "float32", "cpu")
    found = []
    for text in (calibration_text(), demo_text()):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        cache = DynamicCache(config=loaded.config)
        loaded(ids, **cache_argument(loaded, cache), logits_to_keep=1)
        every = max(len(cache.layers) // count, 1)
        chosen = cache.layers[every // 2 :: every][:count]
        # Without the first tokens, which are stored as they are.
        found.append([Sample(*(x[0, :, 4:] for x in (one.keys, one.values))) for one in chosen])
    return found[0], found[1]


def _profile(known: list[Sample]) -> StoreProfile:
    """In which all error is alike."""
    layers = {i: LayerProfile(_side(x.key), _side(x.value)) for i, x in enumerate(known)}
    samples = {i: [x] for i, x in enumerate(known)}
    queries = {}
    for i, x in enumerate(known):
        heads, _, dim = x.key.shape
        none = torch.zeros(heads, dim)
        queries[i] = QueryMoments(none, torch.zeros(heads, dim, dim, dtype=torch.bfloat16))
    return build_profile(layers, samples, queries, "", "", known[0].key.shape[1])


def _side(x: Tensor) -> Side:
    heads, _, dim = x.shape
    eye, ones = torch.eye(dim).expand(heads, dim, dim), torch.ones(heads, dim // GROUP)
    return Side(eye, eye, torch.zeros(heads, dim), ones, torch.ones(heads), ones)


if __name__ == "__main__":
    app()
