"""The storage profile of the model that a server runs, found without loading the model again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusquant.entropy.profile import StoreProfile
from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.hf.fingerprint import fingerprint_of_folder
from nexusquant.hf.store_profiles import default_store_path, load_store_profile
from nexusquant.vllm.entropy import EntropyCodec
from nexusquant.vllm.rotary import check_rotation, frequencies

logger = logging.getLogger("vllm.nexusquant")

_BUILD = (
    "build it once with `nexusquant calibrate MODEL --store -o FILE` and give all servers the file"
    ' as "codec_options": {"profile": FILE}; the codec e8 needs none'
)


@dataclass(frozen=True)
class Served:
    """What a server runs.

    Attributes:
        model: folder or hub id.
        config: the Hugging Face config.
        revision, download_dir: of a hub id.
        tensor_parallel, pipeline_parallel: numbers of ranks.
    """

    model: str
    config: Any
    revision: str | None = None
    download_dir: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


def entropy_codec(
    served: Served | None, profile: str | Path | None = None, bits: float = 5.0
) -> EntropyCodec:
    """The codec `entropy` for a server.

    Args:
        profile: file of the storage profile; default: where `nexusquant calibrate --store` puts it.

    Raises:
        ConfigError: there is no profile, or bits out of range.
        ProfileError: a file that is no storage profile, or damaged.
        UnsupportedError: several ranks, or keys that are rotated in a way that is not known.
    """
    if not isinstance(profile, str | Path | None):
        raise ConfigError(f"profile={profile!r}: must be the path of a storage profile.")
    if served is None:
        raise ConfigError("the codec entropy is made for a model: say which.")
    if served.tensor_parallel * served.pipeline_parallel > 1:
        raise UnsupportedError(
            f"tensor parallelism {served.tensor_parallel}, pipeline parallelism"
            f" {served.pipeline_parallel}: a storage profile joins all KV heads of all layers,"
            ' which no rank has. Use "codec": "e8".'
        )
    try:
        rope = frequencies(served.config)
        check_rotation(served.config, rope)
    except UnsupportedError as error:
        raise UnsupportedError(f'{error} Use "codec": "e8".') from error
    return EntropyCodec(_profile(served, profile), rope, bits)


def _profile(served: Served, given: str | Path | None) -> StoreProfile:
    folder = _folder(served)
    mine = None if folder is None else fingerprint_of_folder(folder)
    if given is not None:
        profile = load_store_profile(given)
        if mine not in (None, profile.fingerprint):
            logger.warning(
                "The storage profile %s was built from other weights than %s has: if the models"
                " are not close, blocks take more bytes and lose more.",
                given,
                served.model,
            )
        return profile
    if mine is None:
        raise ConfigError(
            f'codec "entropy": which weights {served.model} has cannot be told without loading'
            f" it, so its storage profile has to be given: {_BUILD}."
        )
    path = default_store_path(mine)
    if not path.is_file():
        raise ConfigError(f'codec "entropy": no storage profile in {path}: {_BUILD}.')
    return load_store_profile(path)


def _folder(served: Served) -> Path | None:
    """Where the files of the model are on this machine."""
    path = Path(served.model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            served.model,
            revision=served.revision,
            cache_dir=served.download_dir,
            local_files_only=True,
        )
    except (OSError, ValueError):  # not there, or neither a folder nor an id
        return None
    return Path(found)
