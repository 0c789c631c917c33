"""`nexusquant calibrate`: build and keep the profile of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nexusquant.cli.common import Device, Dtype, Model, folder, read
from nexusquant.errors import ConfigError

if TYPE_CHECKING:
    from nexusquant.entropy.profile import StoreProfile
    from nexusquant.profile import Profile


def calibrate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to learn from; repeatable.")
    ] = None,
    self_: Annotated[
        bool, typer.Option("--self", help="Learn from text that the model writes itself.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per piece of text.")] = 2048,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces to learn from, at most.")] = 10,
    rope_page: Annotated[
        int | None,
        typer.Option(
            min=0, help="Key frame, as in the settings it will be used with; default: the presets'."
        ),
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="The profile that `pack` and stored prefixes need.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default: the user's cache folder.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Build the profile of a model, once: transforms and what errors in each head cost.

    The first use of a model does so by itself, on less text. Without --text or --self it is the
    text that this package brings along, ten kinds of it; with --store the Python language reference
    that every Python carries.
    """
    from nexusquant import corpus
    from nexusquant.calibration import calibrate as build
    from nexusquant.calibration import calibrate_store, own_text
    from nexusquant.config import CompressionConfig
    from nexusquant.demo import calibration_text
    from nexusquant.hf.automatic import SOURCE
    from nexusquant.hf.store_profiles import save_store_profile
    from nexusquant.loading import load_model
    from nexusquant.profile_store import save_profile
    from nexusquant.progress import progress_steps, quiet_transformers
    from nexusquant.statistics import MIN_TOKENS

    if tokens < MIN_TOKENS:
        raise ConfigError(f"--tokens {tokens}: a profile needs at least {MIN_TOKENS}.")
    page = CompressionConfig.rope_page if rope_page is None else rope_page
    if store and rope_page is not None:
        raise ConfigError("--rope-page: stored keys have no RoPE at all, leave it out.")
    if text and self_:
        raise ConfigError("--text and --self: give one of them.")
    contents = [read(path) for path in text or []]
    with quiet_transformers(), progress_steps() as progress:
        network, tokenizer = load_model(folder(model, progress), dtype, device)
        if self_:
            source = "text sampled from the model"
            contents = own_text(
                network, tokenizer, tokens=tokens, pieces=pieces, report=progress.step
            )
        else:
            source = ", ".join(path.name for path in text or []) or (
                "Python language reference" if store else SOURCE
            )
            ours = [calibration_text()] if store else [each.text for each in corpus.pieces()]
            contents = contents or ours
        options: dict[str, Any] = {
            "tokens": tokens, "pieces": pieces, "source": source, "report": progress.step,
        }  # fmt: skip
        profile: Profile | StoreProfile
        if store:
            profile = calibrate_store(network, tokenizer, contents, **options)
            path = save_store_profile(profile, output)
        else:
            profile = build(network, tokenizer, contents, rope_page=page, **options)
            path = save_profile(profile, output)
    typer.echo(
        f"{len(profile.layers)} layers from {profile.tokens:,} tokens of {source}:"
        f" {profile.nbytes / 2**20:.1f} MiB, shared by all sequences\n{path}"
    )
