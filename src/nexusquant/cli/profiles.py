"""`--profile`: where a command's profile comes from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from nexusquant.config import CompressionConfig
    from nexusquant.progress import Steps

ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="auto (calibrate the model once), first-prompt, none, or a profile's file; default:"
        " NEXUSQUANT_PROFILE, else auto.",
    ),
]


def check_profile(given: str | None) -> None:
    """Raises `ConfigError` for what is neither a mode nor a file."""
    from nexusquant.hf.profiles import MODES

    if given is not None and given not in MODES and not Path(given).expanduser().is_file():
        raise ConfigError(
            f"--profile {given}: must be one of {', '.join(MODES)}, or a profile's file."
        )


def prepare_profile(
    model: Any,
    tokenizer: Any,
    configs: Iterable[CompressionConfig],
    given: str | None,
    progress: Steps,
) -> None:
    """Have the profile that caches of this process will use, so that no figure holds the making.

    Raises:
        ProfileError: the file given is damaged, or not of this model and these settings.
    """
    from nexusquant.calibration import ensure_profile
    from nexusquant.hf.profiles import MODES, default_mode, find_profile, remember_profile

    if given is not None:  # for this process; what is known is used in mode "first-prompt"
        os.environ["NEXUSQUANT_PROFILE"] = given if given in MODES else "first-prompt"
    pages = {x.rope_page for x in configs if x.codec == "e8" and x.transform == "klt"}
    for page in sorted(pages):
        if given is not None and given not in MODES:
            found = find_profile(model, page, Path(given).expanduser())
            if found is not None:
                remember_profile(model, found)
        elif default_mode() == "auto":
            ensure_profile(model, tokenizer, rope_page=page, report=progress.step)
