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


def pack(
    model: Model,
    prompt_file: PromptFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .nxq file to write.")
    ] = None,
    store: StoreUrl = None,
    key: Annotated[str | None, typer.Option(help="In the store; default: by content.")] = None,
    bits: Annotated[
        float, typer.Option(min=0.05, max=16, help="Bits per element: 16 / bits is the ratio.")
    ] = 1.5,
    quality: Annotated[
        str | None,
        typer.Option(help="Keep the codes of a live cache of this preset, exactly, instead."),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="entropy; of live caches: raw, zstd, zstd+delta.")
    ] = "auto",
    embed_profile: Annotated[
        bool, typer.Option("--embed-profile", help="A file that needs nothing else; megabytes.")
    ] = False,
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
    if (codec in _LIVE and quality is None) or (codec == "entropy" and quality is not None):
        raise ConfigError(f"--codec {codec}: {', '.join(_LIVE)} are of caches with --quality.")
    text = read(prompt_file)
    import torch
    from transformers import DynamicCache

    from nexusquant import NexusCache
    from nexusquant.calibration import ensure_store_profile, read_prompt
    from nexusquant.demo import calibration_text
    from nexusquant.hf.cache import text_config
    from nexusquant.loading import load_model
    from nexusquant.prefix.saving import save
    from nexusquant.progress import progress_steps, quiet_transformers
    from nexusquant.stores import open_store

    with quiet_transformers(), progress_steps() as progress:
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        if quality is None:
            profile = ensure_store_profile(
                network, tokenizer, calibration_text(), report=progress.step
            )
            cache: Any = DynamicCache(config=text_config(network))
        else:
            profile, cache = None, NexusCache(network, quality)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        progress.step(f"Reading {ids.shape[1]:,} tokens")
        with torch.inference_mode():
            read_prompt(network, ids.to(network.device), cache)
        progress.step("Encoding")
        place: Any = nullcontext(output) if store is None else open_store(store)
        with place as target:
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
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Read all of a stored prefix and compare every checksum; status 2 if it is damaged."""
    from nexusquant.loading import load_model
    from nexusquant.prefix.loading import load, open_prefix
    from nexusquant.progress import progress_steps, quiet_transformers

    with _place(prefix, store) as place, quiet_transformers(), progress_steps() as progress:
        progress.step(f"Reading {prefix}")
        with open_prefix(*place) as reader:
            reader.verify()
        if model is not None:
            network, _ = load_model(folder(model, progress), dtype, device)
            load(place[0], network, key=place[1], report=progress.tick)
    typer.echo(f"{prefix}: all checksums are right" + ("" if model is None else ", it decodes"))


def behind(
    prefix: str,
    store: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    quality: CompressionConfig | None,
) -> tuple[Tensor, Callable[[], Any]]:
    """Token ids of a prefix and the text behind it, and how to open the prefix's cache."""
    import torch

    from nexusquant.prefix.loading import check_model, load, open_prefix, prefix_tokens

    with _place(prefix, store) as place, open_prefix(*place) as reader:
        check_model(reader, model)
        first = prefix_tokens(reader)
    if first is None:
        raise ConfigError(f"{prefix} was saved without its token ids: use nexusquant.load.")
    if max(first, default=0) >= model.get_input_embeddings().num_embeddings:
        raise FormatError(f"{prefix}: token ids that the model has not.")
    more = tokenizer(text, add_special_tokens=False).input_ids

    def opened() -> Any:
        with _place(prefix, store) as place:
            cache = load(place[0], model, key=place[1], quality=quality)
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
    table.add_section()
    for name in reader.streams:
        table.add_row(name, f"{reader.size(name):,} B")
    table.add_section()
    nbytes = sum(map(reader.size, reader.streams))
    table.add_row("all streams", f"{nbytes:,} B")
    elements = reader.meta.get("elements")
    if isinstance(elements, int) and elements > 0 and nbytes:
        table.add_row("bits per element", f"{8 * nbytes / elements:.3f}")
        table.add_row("ratio to fp16", f"{2 * elements / nbytes:.2f}x")
    return table


def _printable(text: str) -> str:
    """Of a file that anybody may have written: no control characters, no endless lines."""
    kept = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return "".join(x if x.isprintable() else f"\\x{ord(x):02x}" for x in kept)
