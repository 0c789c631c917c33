"""`nexusquant pack`, `inspect` and `verify`: prefixes in files and stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nexusquant.cli.common import Device, Dtype, Model, PromptFile, folder, read
from nexusquant.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nexusquant.config import CompressionConfig
    from nexusquant.nxq import Reader

_LIVE = ("raw", "zstd", "zstd+delta")
_SHOWN = 80  # characters of a value
Prefix = Annotated[str, typer.Argument(help="An .nxq file, or with --store a key.")]
StoreUrl = Annotated[
    str | None, typer.Option("--store", help="A directory, redis://..., s3://..., ...")
]
StoreProfileFile = Annotated[
    Path | None,
    typer.Option(help="What `calibrate --store -o` wrote; default: found by the prefix, or model."),
]


def pack(
    model: Model,
    prompt_file: PromptFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .nxq file to write.")
    ] = None,
    store: StoreUrl = None,
    key: Annotated[str | None, typer.Option(help="In the store; default: by content.")] = None,
    bits: Annotated[
        float | None,
        typer.Option(min=0.05, max=16, help="Bits per element, default 1.5: ratio 16 / bits."),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="Keep the codes of a live cache of this preset, exactly, instead."),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="entropy; of live caches: raw, zstd, zstd+delta.")
    ] = "auto",
    embed_profile: Annotated[
        bool | None,
        typer.Option(help="A file that needs nothing else; megabytes. Default: if need be."),
    ] = None,
    store_profile: StoreProfileFile = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Read a text once and keep its KV cache: `generate --prefix` goes on behind it."""
    if (output is None) == (store is None):
        raise ConfigError("give --output FILE or --store URL, one of them.")
    if prompt_file is None:
        raise ConfigError("give --prompt-file, the text of the prefix.")
    if key is not None and store is None:
        raise ConfigError("--key: give --store, a file has its path.")
    if codec not in ("auto", "entropy", *_LIVE):
        raise ConfigError(f"--codec {codec}: known are auto, entropy, {', '.join(_LIVE)}.")
    if (codec in _LIVE and quality is None) or (codec == "entropy" and quality is not None):
        raise ConfigError(f"--codec {codec}: {', '.join(_LIVE)} are of caches with --quality.")
    for name, given in (("--bits", bits), ("--store-profile", store_profile)):
        if quality is not None and given is not None:
            raise ConfigError(f"{name}: a cache with --quality is copied as it is, leave it out.")
    text = read(prompt_file)
    import torch
    from transformers import DynamicCache

    from nexusquant import NexusCache
    from nexusquant.calibration import ensure_store_profile
    from nexusquant.demo import calibration_text
    from nexusquant.hf.cache import text_config
    from nexusquant.hf.collecting import read_prompt
    from nexusquant.loading import load_model
    from nexusquant.prefix.arguments import check_target
    from nexusquant.prefix.saving import save
    from nexusquant.progress import compile_kernels, progress_steps, quiet_transformers
    from nexusquant.stores import open_store

    place: Any = nullcontext(output) if store is None else open_store(store)
    with quiet_transformers(), progress_steps() as progress, place as target:
        check_target(target, key)
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        compile_kernels(progress, network, storage=True)
        profile: Any = store_profile
        if quality is None:
            if profile is None:
                profile = ensure_store_profile(
                    network, tokenizer, calibration_text(), report=progress.step
                )
            cache: Any = DynamicCache(config=text_config(network))
        else:
            cache = NexusCache(network, quality)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        progress.step(f"Reading {ids.shape[1]:,} tokens")
        with torch.inference_mode():
            read_prompt(network, ids.to(network.device), cache)
        progress.step("Encoding")
        saved = save(
            cache, target, model=network, tokens=ids, codec=codec, bits=bits, profile=profile,
            embed_profile=embed_profile, key=key, report=progress.tick,
        )  # fmt: skip
    typer.echo(str(saved))


def inspect(prefix: Prefix, store: StoreUrl = None) -> None:
    """What a stored prefix holds, and what its parts take. Reads its head only."""
    from rich.console import Console

    from nexusquant.prefix.loading import open_prefix

    with _place(prefix, store) as place, open_prefix(*place) as reader:
        Console().print(_contents(reader))


def verify(
    prefix: Prefix,
    store: StoreUrl = None,
    model: Annotated[
        str | None, typer.Option(help="Also decode it, with this model's profile.")
    ] = None,
    store_profile: StoreProfileFile = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Read all of a stored prefix and compare every checksum; status 2 if it is damaged."""
    if model is None and (store_profile, dtype, device) != (None, "auto", "auto"):
        raise ConfigError("--store-profile, --dtype and --device are of --model: give it, too.")
    from nexusquant.loading import load_model
    from nexusquant.prefix.loading import load_from, open_prefix
    from nexusquant.progress import progress_steps, quiet_transformers

    with (
        _place(prefix, store) as place, open_prefix(*place) as reader, quiet_transformers(),
        progress_steps() as progress,
    ):  # fmt: skip
        progress.step(f"Reading {prefix}")
        reader.verify(lambda done, size: progress.tick(f"{done:,} of {size:,} bytes"))
        if model is not None:
            network, _ = load_model(folder(model, progress), dtype, device)
            load_from(reader, network, place[0], store_profile=store_profile, report=progress.tick)
    typer.echo(f"{prefix}: all checksums are right" + ("" if model is None else ", it decodes"))


def behind(
    prefix: str,
    store: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    quality: CompressionConfig | None,
    store_profile: Path | None,
) -> tuple[Tensor, Callable[[], Any]]:
    """Token ids of a prefix and the text behind it, and how to open the prefix's cache."""
    import torch

    from nexusquant.prefix.loading import check_model, load_from, open_prefix, prefix_tokens

    with _place(prefix, store) as place, open_prefix(*place) as reader:
        check_model(reader, model)
        first, digest = prefix_tokens(reader), reader.digest
    if first is None:
        raise ConfigError(f"{prefix} was saved without its token ids: use nexusquant.load.")
    if max(first, default=0) >= model.get_input_embeddings().num_embeddings:
        raise FormatError(f"{prefix}: token ids that the model has not.")
    more = tokenizer(text, add_special_tokens=False).input_ids

    def opened() -> Any:
        with _place(prefix, store) as place, open_prefix(*place) as reader:
            if reader.digest != digest:
                raise FormatError(f"{prefix} was replaced while it was read: try again.")
            cache = load_from(reader, model, place[0], quality=quality, store_profile=store_profile)
        if any(getattr(layer, "batch_size", 1) > 1 for layer in cache.layers):
            raise ConfigError(f"{prefix} holds several sequences: use nexusquant.load.")
        return cache

    return torch.tensor([first + more]), opened


@contextmanager
def _place(prefix: str, store: str | None) -> Iterator[tuple[Any, str | None]]:
    """What `load` takes, while it is open."""
    from nexusquant.stores import open_store

    if store is None:
        yield prefix, None
    else:
        with open_store(store) as opened:
            yield opened, prefix


def _contents(reader: Reader) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"format {reader.version}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in reader.meta.items():
        if isinstance(value, (str, int, float)):
            shown = f"{value:,}" if isinstance(value, int) else _printable(str(value))
            table.add_row(Text(_printable(name)), Text(shown))
    live = reader.meta.get("live")
    for name, value in live.items() if isinstance(live, dict) else ():
        if isinstance(value, (str, int)):
            table.add_row(Text(_printable(f"live.{name}")), Text(_printable(str(value))))
    table.add_section()
    streams = sum(map(reader.size, reader.streams))
    for name in reader.streams:
        table.add_row(name, f"{reader.size(name):,} B")
    table.add_section()
    table.add_row("header, digests, padding", f"{reader.nbytes - streams:,} B")
    table.add_row("the file", f"{reader.nbytes:,} B")
    elements = reader.meta.get("elements")
    if isinstance(elements, int) and elements > 0:
        table.add_row("bits per element", f"{8 * reader.nbytes / elements:.3f}")
        table.add_row("ratio to fp16", f"{2 * elements / reader.nbytes:.2f}x")
    return table


def _printable(text: str) -> str:
    """Of a file that anybody may have written: no control characters, no endless lines."""
    kept = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return "".join(x if x.isprintable() else f"\\x{ord(x):02x}" for x in kept)
