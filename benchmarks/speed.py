"""Times of the cache and of its kernels, beside the uncompressed ones of the same run.

    python -m benchmarks.speed model MODEL --context 1024 --context 4096 --json out.json
    python -m benchmarks.speed kernels --json out.json

Medians; on a busy machine only ratios mean something, and not much. `make bench` runs both.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from benchmarks.compare import environment
from benchmarks.plot import draw_times
from benchmarks.synthetic import RATES, half_rotated, random_tiers
from nexusquant import NexusCache
from nexusquant.attention import attend
from nexusquant.demo import calibration_text, demo_text
from nexusquant.hf.cache_names import cache_argument
from nexusquant.kernels import operator_for
from nexusquant.kernels.warmup import warm_up
from nexusquant.layout import RowLayout
from nexusquant.loading import demo_model, load_model
from nexusquant.mask import Mask
from nexusquant.math.e8 import GROUP, Book
from nexusquant.progress import compile_kernels, kernel_report, progress_steps, quiet_transformers

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_show_locals=False)
Json = Annotated[Path | None, typer.Option("--json", help="Result file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Picture, needs matplotlib.")]
STEPS = 72  # fresh tokens settle once among them


@app.command()
def model(
    name: Annotated[
        str, typer.Argument(help="Hub id, model folder, .gguf file, or 'demo'.")
    ] = "demo",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt.")] = None,
    quality: Annotated[list[str] | None, typer.Option(help="Presets.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Prefills of each.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Prefill and time per token of a model, by context length, against DynamicCache."""
    rows: list[dict[str, Any]] = []
    with progress_steps() as progress, quiet_transformers(), torch.inference_mode():
        folder = demo_model(progress.step) if name == "demo" else name
        progress.step(f"Loading {name}")
        loaded, tokenizer = load_model(folder, dtype, device)
        compile_kernels(progress, loaded)
        ids = tokenizer(demo_text() + calibration_text(), return_tensors="pt").input_ids
        for length in context or (1024, 4096):
            ids = ids.to(loaded.device).repeat(1, -(-(length + 2 * STEPS + 2) // ids.shape[1]))
            caches: dict[str, Callable[[], Any]] = {
                "uncompressed": lambda: DynamicCache(config=loaded.config)
            }
            for preset in quality or ("high", "balanced"):
                caches[preset] = lambda preset=preset: NexusCache(loaded, preset)
                first = cache_argument(loaded, caches[preset]())
                loaded(ids[:, :1024], **first)  # the profile
            found: dict[str, list[tuple[float, list[float]]]] = {kind: [] for kind in caches}
            for turn, (kind, make) in itertools.product(range(repeat), caches.items()):
                progress.step(f"{length:,} tokens, {kind}, {turn + 1}/{repeat}")
                found[kind].append(_decode(loaded, ids, length, make()))
            rows += _model_rows(found, length)
    table = Table("tokens", "cache", title=f"{name}, {dtype} on {loaded.device.type}")
    for column in ("prefill s", "ratio", "step ms", "ratio", "mean step ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row[key]:.{digits}f}" for key, digits in _COLUMNS]
        table.add_row(f"{row['tokens']:,}", row["cache"], *cells)
    if plot:
        draw_times(rows, "cache", "step_ms", "time per token, ms", plot)
    report(table, {"model": Path(name).name, "dtype": dtype, "rows": rows}, json_file)


_COLUMNS = (
    ("prefill", 2), ("prefill_ratio", 3), ("step_ms", 1), ("step_ratio", 3), ("mean_step_ms", 1),
    ("mean_step_ratio", 3),
)  # fmt: skip


def _decode(loaded: Any, ids: Tensor, length: int, cache: Any) -> tuple[float, list[float]]:
    """Seconds of the prefill and of every step of one cycle, in the steady state."""
    start = time.perf_counter()
    loaded(ids[:, :length], **cache_argument(loaded, cache), logits_to_keep=1)
    _wait(ids)
    prefill, steps = time.perf_counter() - start, []
    for i in range(length, length + 2 + STEPS):
        start = time.perf_counter()
        loaded(ids[:, i : i + 1], **cache_argument(loaded, cache))
        _wait(ids)
        steps.append(time.perf_counter() - start)
    return prefill, steps[2:]


def _model_rows(
    found: dict[str, list[tuple[float, list[float]]]], length: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, runs in found.items():
        steps = [step for _, run in runs for step in run]
        row = {
            "tokens": length, "cache": kind, "prefill": median(prefill for prefill, _ in runs),
            "step_ms": 1e3 * median(steps), "mean_step_ms": 1e3 * sum(steps) / len(steps),
        }  # fmt: skip
        first = rows[0] if rows else row
        for key in ("prefill", "step_ms", "mean_step_ms"):
            row[f"{key.removesuffix('_ms')}_ratio"] = row[key] / first[key]
        rows.append(row)
    return rows


@app.command()
def kernels(
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    group: Annotated[int, typer.Option(min=1, help="Query heads per KV head.")] = 4,
    dim: Annotated[int, typer.Option(min=8, help="Dimension of a head.")] = 128,
    repeat: Annotated[int, typer.Option(min=3, help="Calls of each.")] = 15,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Attention on codes against SDPA, encoding and decoding against memcpy, on random tensors."""
    contexts, rows = context or [1024, 2048, 4096, 8192, 16384, 32768], []
    with progress_steps() as progress:
        warm_up([group], progress=kernel_report(progress))
        for length in contexts:
            progress.step(f"{length:,} tokens")
            rows += _kernel_rows(length, heads, group, dim, repeat)
    operator = operator_for(torch.device("cpu")).name
    title = f"{heads} KV heads, {group} queries each, dimension {dim}, operator {operator}"
    table = Table("tokens", "what", title=f"{title}, {torch.get_num_threads()} threads")
    for column in ("ms", "of SDPA fp32", "M elements/s", "of memcpy", "bytes read per token"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}", row["what"], f"{row['ms']:.3f}",
            *(f"{row[key]:{form}}" if key in row else ""
              for key, form in (("of_sdpa", ".3f"), ("rate", ",.0f"), ("of_memcpy", ".3f"),
                                ("bytes", ",.0f"))),
        )  # fmt: skip
    if len(contexts) > 1:
        for what in dict.fromkeys(row["what"] for row in rows):
            table.add_row("", what, "", "", "", "", f"exponent {_exponent(rows, what):.2f}")
    if plot:
        draw_times(rows, "what", "ms", "ms", plot)
    report(table, {"heads": heads, "group": group, "dim": dim, "rows": rows}, json_file)


def _kernel_rows(
    length: int, heads: int, group: int, dim: int, repeat: int
) -> list[dict[str, Any]]:
    shape = (1, heads, length, dim)
    query, keys, values = (torch.randn(s) for s in ((1, heads * group, 1, dim), shape, shape))
    options = {"frame": half_rotated(length + 1, dim), "scaling": dim**-0.5}
    rows: list[dict[str, Any]] = []

    def add(what: str, call: Callable[[], object], elements: int, bytes_read: float) -> None:
        call()
        times = [_seconds(call) for _ in range(repeat)]
        row = {"tokens": length, "what": what, "ms": 1e3 * median(times)}
        row["rate"] = elements / median(times) / 1e6
        row["bytes"] = bytes_read / length
        rows.append(row)

    elements = 2 * keys.numel()
    for name, dtype in (("SDPA fp32", torch.float32), ("SDPA bf16", torch.bfloat16)):
        given = [x.to(dtype) for x in (query, keys, values)]
        attention = partial(scaled_dot_product_attention, *given, enable_gqa=True)
        add(name, attention, elements, elements * dtype.itemsize)
    for name, rates in RATES.items():
        parts = random_tiers(keys, values, rates)
        size = sum(x.nbytes for p in parts for x in (p.key_rows, p.value_rows, p.gains))
        attention = partial(attend, query, parts, Mask(None, length), **options)
        add(f"codes, {name}", attention, elements, size)
    operator, book = operator_for(torch.device("cpu")), Book()
    copy = torch.empty_like(keys)
    add("memcpy", partial(copy.copy_, keys), keys.numel(), keys.nbytes)
    columns = keys.mT.contiguous().mT
    for bits in (1, 2, 4):
        layout = RowLayout(((bits,) * (dim // GROUP),) * heads)
        codes, sizes = operator.encode(columns, layout, book)
        encode = partial(operator.encode, columns, layout, book)
        decode = partial(operator.decode, codes, sizes, layout, book)
        add(f"encode, {bits} bits", encode, keys.numel(), keys.nbytes)
        add(f"decode, {bits} bits", decode, keys.numel(), codes.nbytes)
    named = {row["what"]: row["ms"] for row in rows}
    for row in rows:
        if row["what"].startswith(("SDPA", "codes")):
            row["of_sdpa"] = row["ms"] / named["SDPA fp32"]
        else:
            row["of_memcpy"] = row["ms"] / named["memcpy"]
    return rows


def _exponent(rows: Sequence[dict[str, Any]], what: str) -> float:
    """Of time by context, from the shortest to the longest: 1 is linear."""
    mine = [row for row in rows if row["what"] == what]
    first, last = mine[0], mine[-1]
    return math.log(last["ms"] / first["ms"]) / math.log(last["tokens"] / first["tokens"])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def report(table: Table, result: dict[str, Any], json_file: Path | None) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    result["environment"] = environment()
    result["threads"] = torch.get_num_threads()
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"{result['threads']} threads, peak memory {result['peak_memory_mib']:,.0f} MiB")
    if json_file:
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    app()
