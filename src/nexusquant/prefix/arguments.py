"""What `save` and `load` are given, checked before anything long begins."""

from __future__ import annotations

import operator
import os
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores import Store
from nexusquant.stores.base import check_key


def path_of(place: str | Path) -> Path:
    """The path of a file.

    Raises:
        ConfigError: something else.
        StoreError: of a user who has no home.
    """
    if not isinstance(place, (str, Path)):
        raise ConfigError(f"expected a path or a store, got {type(place).__name__}.")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise StoreError(f"{place}: {error}") from error


def check_target(target: str | Path | Store, key: str | None = None) -> None:
    """Whether something can be written there, as far as can be told before there is anything.

    Raises:
        ConfigError: no path or store; a key that is none, or for a file.
        StoreError: a folder, a place that cannot be written to, a server that is away.
    """
    if isinstance(target, Store):
        if key is not None:
            check_key(key)
        target.contains("any" if key is None else key)
        return
    path = path_of(target)
    if key is not None:
        raise ConfigError("key is for stores; a file has its path.")
    folder = next((x for x in path.absolute().parents if x.exists()), Path("/"))
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StoreError(f"{path}: not written, no file can be made there.")


def token_bytes(tokens: Any, length: int, model: Any) -> bytes | None:
    """Little-endian u32."""
    if tokens is None:
        return None
    if isinstance(tokens, Mapping):
        raise ConfigError("token ids, not what a tokenizer gives: its .input_ids are them.")
    ids = tokens if isinstance(tokens, Tensor) else _listed(tokens)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.shape not in ((length,), (1, length)):
        raise ConfigError(
            f"token ids of shape {tuple(ids.shape)} and {ids.dtype}, but the cache holds {length}"
            f" tokens: give integers ({length},) or (1, {length})."
        )
    low, high = int(ids.min()), int(ids.max())
    known = model.get_input_embeddings().num_embeddings
    if not 0 <= low <= high < known:
        raise ConfigError(f"token ids from {low} to {high}: the model has 0 to {known - 1}.")
    packed = array("I", ids.flatten().tolist())
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _listed(tokens: Any) -> Tensor:
    try:
        return torch.tensor([operator.index(x) for x in tokens], dtype=torch.long)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"token ids must be integers ({error}).") from error
