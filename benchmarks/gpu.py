"""Checks the Triton kernels on a GPU and times them beside what they replace, in a few minutes.

    python -m benchmarks.gpu --json out.json

Times are medians of CUDA graph replays, over inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.speed import Json, report
from benchmarks.synthetic import RATES, SHARES, falling_rates, half_rotated
from nexusquant.kernels.base import Entry, Request
from nexusquant.kernels.reference import Reference
from nexusquant.layout import RowLayout
from nexusquant.mask import Mask
from nexusquant.math.e8 import GROUP, Book
from nexusquant.progress import progress_steps
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens, ExactTokens

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_show_locals=False)
L2_BYTES = 256 << 20  # more than any GPU has


@dataclass(frozen=True)
class Shape:
    """Attention of one layer."""

    batch: int
    tokens: int
    heads: int = 8
    group: int = 4
    dim: int = 128


@app.command()
def main(
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows.")] = None,
    repeat: Annotated[int, typer.Option(min=3, help="Replays of each.")] = 30,
    json_file: Json = None,
) -> None:
    """Check, then time."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device; `make bench` measures CPUs.")
    device = torch.device("cuda")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "rows": []}
    with progress_steps() as progress, device, torch.inference_mode():
        progress.step("Checking against the reference")
        result["errors"] = check()
        result["bandwidth"] = bandwidth(repeat)
        progress.step("Encoding a prefill of 1,664 tokens, 32 layers")
        result["encode_ms"] = encode_prefill(32, Shape(1, 1664), repeat)
        for tokens in context or (32_768, 131_072):
            for rows in batch or (1, 16):
                progress.step(f"Attention, {tokens:,} tokens, batch {rows}")
                result["rows"] += attention(Shape(rows, tokens), repeat, result["bandwidth"])
        result["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    table = Table("tokens", "batch", "what", title=f"{result['device']}, 8 KV heads of 128, GQA 4")
    for column in ("ms", "of SDPA", "ms as called", "GB/s", "of copying"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['tokens']:,}", str(row["batch"]), row["what"], f"{row['ms']:.4f}",
            f"{row['of_sdpa']:.3f}", f"{row['called_ms']:.3f}", f"{row['rate'] / 1e9:,.0f}",
            f"{row['share']:.2f}",
        )  # fmt: skip
    for name, error in result["errors"].items():
        table.add_row("", "", f"largest error, {name}", f"{error:.1e}")
    for name, ms in result["encode_ms"].items():
        table.add_row("1,664", "1", f"encode 32 layers, {name}", f"{ms:.3f}")
    report(table, result, json_file)


def check(tokens: int = 3000) -> dict[str, float]:
    """Largest errors against the reference on fresh random inputs, in units of the outputs' size.

    Raises:
        AssertionError: one is larger than half precision explains, or codes differ.
    """
    triton = _triton()
    errors: dict[str, float] = {}
    for name, dim, group, q_len in (("d 128", 128, 4, 1), ("d 80", 80, 1, 3), ("d 256", 256, 7, 2)):
        shape = Shape(2, tokens, 4, group, dim)
        parts, frame = coded(shape, RATES["lossless"]), half_rotated(tokens, dim)
        query, sinks = torch.randn(2, 4 * group, q_len, dim), torch.randn(4 * group)
        tail = ExactTokens(*torch.randn(2, 2, 4, 9, dim).half(), Slots(tokens - 9, 9))
        seen = Mask(torch.rand(2, tokens) < 0.9, tokens - q_len, window=tokens - 50)
        request = Request(query, [*parts, tail], seen, frame, dim**-0.5, 30.0, sinks)
        mine, theirs = (one.decode_attention(request) for one in (triton, Reference()))
        largest = (mine.output - theirs.output).abs().max()
        errors[name] = float(largest / theirs.output.square().mean().sqrt())
        assert errors[name] < 0.03, f"attention, {name}: {errors}"
        assert float((mine.lse - theirs.lse).abs().max()) < 0.03, f"log-sum-exp, {name}"
    layout, book = layout_of(4, 128, 3.5), Book()
    x, entry = torch.randn(2, 4, 777, 128), entry_of(Shape(2, 777, 4))
    mine, theirs = (one.encode(x, layout, book, entry) for one in (triton, Reference()))
    errors["codes that differ"] = float((mine[0] != theirs[0]).float().mean())
    assert errors["codes that differ"] < 1e-3, "more than ties"
    decoded = (one.decode(*theirs, layout, book) for one in (triton, Reference()))
    errors["decode"] = float(torch.stack(list(decoded)).diff(dim=0).abs().max())
    assert errors["decode"] < 1e-4
    return errors


def entry_of(shape: Shape) -> Entry:
    """A transform of every head, a mean and a scale."""
    return Entry(
        torch.randn(shape.heads, shape.dim, shape.dim) / shape.dim**0.5,
        torch.randn(1, shape.heads, 1, shape.dim), torch.ones(1, shape.heads, 1, 1),
    )  # fmt: skip


def bandwidth(repeat: int) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.empty(L2_BYTES, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * L2_BYTES / seconds([partial(target.copy_, source)], repeat)


def encode_prefill(layers: int, shape: Shape, repeat: int) -> dict[str, float]:
    """Milliseconds to encode keys and values of all layers, at the rates of `high`."""
    from nexusquant.kernels.gpu.operator import launch_encode

    size = (shape.batch, shape.heads, shape.tokens, shape.dim)
    layout, book = layout_of(shape.heads, shape.dim, 1.46), Book()
    entry = entry_of(shape)
    given = [torch.randn(size).half() for _ in range(2 * layers)]
    kernels = [partial(launch_encode, x, layout, book, entry) for x in given]
    calls = [partial(_triton().encode, x, layout, book, entry) for x in given]
    return {
        "kernels": 1e3 * len(given) * seconds(kernels, repeat),
        "as called": 1e3 * len(given) * seconds(calls, repeat, graph=False),
    }


def attention(shape: Shape, repeat: int, copied: float) -> list[dict[str, Any]]:
    """Times of one layer's attention at one size, the uncompressed ones first."""
    rows: list[dict[str, Any]] = []
    query = torch.randn(shape.batch, shape.heads * shape.group, 1, shape.dim).half()

    def add(what: str, calls: Sequence[Callable[[], object]], size: int) -> None:
        took, called = seconds(calls, repeat), seconds(calls, repeat, graph=False)
        first = rows[0]["ms"] if rows else 1e3 * took
        rows.append({
            "tokens": shape.tokens, "batch": shape.batch, "what": what, "ms": 1e3 * took,
            "called_ms": 1e3 * called, "of_sdpa": 1e3 * took / first, "bytes": size,
            "rate": size / took, "share": size / took / copied,
        })  # fmt: skip

    for what, calls, size in uncompressed(shape, query):
        add(what, calls, size)
    frame = half_rotated(shape.tokens, shape.dim)
    for name in ("lossless", "high", "2 bits"):
        calls, size = [], 0
        while len(calls) * size < L2_BYTES and (not calls or query.is_cuda):
            parts = coded(shape, RATES[name])
            size = sum(
                x.nbytes for p in parts
                for x in (p.key_rows, p.value_rows, p.gains, p.slots.stored) if x is not None
            )  # fmt: skip
            request = Request(query, parts, Mask(None, shape.tokens), frame, shape.dim**-0.5)
            calls.append(partial(_triton().decode_attention, request))
        add(f"codes, {name}", calls, size)
        del calls
    return rows


def uncompressed(
    shape: Shape, query: Tensor
) -> Iterator[tuple[str, list[Callable[[], object]], int]]:
    """SDPA, and other libraries that are installed: name, calls on different inputs, bytes."""
    size = (shape.batch, shape.heads, shape.tokens, shape.dim)
    keys, values = (torch.randn(size, dtype=query.dtype) for _ in range(2))
    total = keys.nbytes + values.nbytes
    sdpa = partial(scaled_dot_product_attention, query, keys, values, enable_gqa=True)
    yield "SDPA fp16", [sdpa], total
    turned = [x.transpose(1, 2).contiguous() for x in (query, keys, values)]
    if found := _module("flash_attn"):
        yield "flash-attn fp16", [partial(found.flash_attn_with_kvcache, *turned)], total
    if (found := _module("flashinfer")) and shape.batch == 1:
        one = [turned[0][0, 0], turned[1][0], turned[2][0]]
        yield "FlashInfer fp16", [partial(found.single_decode_with_kv_cache, *one)], total


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def coded(shape: Shape, rates: Sequence[float]) -> list[CodedTokens]:
    """Three tiers of random codes; every head has its own tokens in each."""
    unit = Centre(
        torch.zeros(shape.batch, shape.heads, 1, shape.dim).half(),
        torch.ones(shape.batch, shape.heads, 1, 1).half(),
    )
    order = torch.rand(shape.batch, shape.heads, shape.tokens).argsort(-1)
    ends = [round(sum(SHARES[:i]) * shape.tokens) for i in range(len(SHARES))] + [shape.tokens]
    parts = []
    for (begin, end), rate in zip(pairwise(ends), rates, strict=True):
        layout = layout_of(shape.heads, shape.dim, rate)
        quantizer = Quantizer(layout, Orthonormal("hadamard", shape.dim))
        rows = (
            torch.randint(256, (shape.batch, layout.row_bytes, end - begin), dtype=torch.uint8)
            for _ in range(2)
        )
        gains = torch.randint(5, 8, (shape.batch, shape.heads, end - begin), dtype=torch.uint8)
        slots = Slots.of(order[..., begin:end].sort(-1).values)
        parts.append(CodedTokens(*rows, 17 * gains, unit, unit, slots, quantizer, quantizer))
    return parts


def layout_of(heads: int, dim: int, rate: float) -> RowLayout:
    """Rates that fall from group to group, `rate` bits per element on average."""
    return RowLayout((falling_rates(dim // GROUP, rate),) * heads)


def seconds(calls: Sequence[Callable[[], object]], repeat: int, graph: bool = True) -> float:
    """Median time of one call, over rounds of all of them."""
    _play(calls)  # compiles, and fills caches of tables
    if not torch.cuda.is_available():
        return median(_clock(calls) for _ in range(repeat)) / len(calls)
    torch.cuda.synchronize()
    play = partial(_play, calls)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            play()
        play = captured.replay
    times = []
    for _ in range(repeat):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        play()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return median(times) / len(calls)


def _play(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _clock(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    _play(calls)
    return time.perf_counter() - start


def _triton() -> Any:
    return importlib.import_module("nexusquant.kernels.gpu.operator").Triton()


if __name__ == "__main__":
    app()
