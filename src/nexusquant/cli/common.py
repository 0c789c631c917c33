"""What the commands share: option types, reading files, finding the model."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nexusquant.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from nexusquant.progress import Steps

Model = Annotated[
    str, typer.Argument(help="Hub id, model folder, .gguf file, or 'demo' for SmolLM2-135M.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Quality = Annotated[str, typer.Option(help="Preset; `nexusquant presets` lists them.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="UTF-8 text; - is standard input.", allow_dash=True)
]


def folder(model: str, progress: Steps) -> str:
    """Where to load `model` from; 'demo' is fetched on first use."""
    from nexusquant.loading import demo_model

    folder = str(demo_model(progress.step)) if model == "demo" else model
    progress.step(f"Loading {model}")
    return folder


def parse_settings(settings: list[str]) -> dict[str, Any]:
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


def read(path: Path) -> str:
    """The text of a file, or of standard input for "-".

    Raises:
        LoadError: not readable as UTF-8.
        ConfigError: nothing in it.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path}: cannot read it ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ConfigError(f"{path}: holds no text.")
    return text
