"""Profiles as files: one safetensors file per model and key frame, with a JSON header.

The file is plain tensors and a header that says what they are, so loading one cannot run code. It
belongs to the model whose fingerprint it carries and is refused for any other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nexusquant.errors import ProfileError, StoreError
from nexusquant.folders import cache_dir
from nexusquant.nxq import atomic_file
from nexusquant.profile import SIDES, LayerProfile, Profile, Side
from nexusquant.rank_costs import RANKS, RankCosts

FORMAT = 3
_UNRANKED = 2
"""The format without costs by rank, read and, where there are none, written."""
_FIELDS = ("forward", "inverse", "mean", "variance", "weight", "coherence")
_RANKED = "rank_costs"
_BAD_HEADER = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip


def default_path(fingerprint: str, rope_page: int) -> Path:
    """Where the profile of a model is looked for."""
    return cache_dir() / "profiles" / f"{fingerprint}-page{rope_page}.safetensors"


def save_profile(profile: Profile, path: str | Path | None = None) -> Path:
    """Write a profile; the file appears whole or not at all.

    Args:
        path: default: where `NexusCache` and `nexusquant_evict` will find it.

    Raises:
        ProfileError: not a complete profile, or the disk does not take it.

    Example:
        >>> from nexusquant import calibrate, save_profile
        >>> profile = calibrate(model, tokenizer, [text], pieces=1)
        >>> save_profile(profile).suffix
        '.safetensors'
    """
    data = profile_bytes(profile)
    return write(data, path, lambda: default_path(profile.fingerprint, profile.rope_page))


def profile_bytes(profile: Profile) -> bytes:
    """What `save_profile` writes."""
    if not isinstance(profile, Profile) or not profile.complete or not profile.layers:
        raise ProfileError(
            "not a profile, or it has no layers yet: run a long prompt, or calibrate, first."
        )
    tensors = {
        f"{index}.{side}.{name}": getattr(getattr(layer, side), name).contiguous()
        for index, layer in profile.layers.items()
        for side in SIDES
        for name in _FIELDS
    }
    for index, layer in profile.layers.items():
        for side, x in zip(SIDES, layer.rank_costs or (), strict=False):
            tensors[f"{index}.{side}.{_RANKED}"] = x.contiguous()
    header = {
        "format": FORMAT if any(x.rank_costs for x in profile.layers.values()) else _UNRANKED,
        "fingerprint": profile.fingerprint,
        "rope_page": profile.rope_page,
        "source": profile.source,
        "tokens": profile.tokens,
        "inverse_residual": {str(i): x.inverse_residual for i, x in profile.layers.items()},
    }
    return save(tensors, {"nexusquant": json.dumps(header, sort_keys=True)})


def write(data: bytes, path: str | Path | None, default: Callable[[], Path]) -> Path:
    """A profile's file, at the path or else at the default; it appears whole or not at all.

    One that is replaced at the default is kept beside it, as something may be coded with it.

    Raises:
        ProfileError: no path, or the disk does not take it.
    """
    try:
        target = default() if path is None else profile_file(path)
    except RuntimeError as error:  # a user without a home
        raise ProfileError(f"no cache directory to write to ({error}): give a path.") from error
    try:
        if path is None and target.is_file():
            old = target.read_bytes()
            if old == data:
                return target
            _write(kept_path(target, digest_of(old)), old)
        _write(target, data)
    except (OSError, StoreError) as error:
        raise ProfileError(f"{target}: cannot write the profile ({error}).") from error
    return target


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def digest_of(data: bytes) -> str:
    """32 hex digits of a profile's file."""
    return blake2b(data, digest_size=16).hexdigest()


def kept_path(path: Path, digest: str) -> Path:
    """Where a profile is kept that was replaced at `path`."""
    return path.with_name(f"{path.stem}-{digest}{path.suffix}")


def kept(path: Path) -> list[Path]:
    """The profile at a default path, and those that it replaced."""
    return [path, *path.parent.glob(f"{path.stem}-*{path.suffix}")]


def load_profile(path: str | Path, fingerprint: str | None = None) -> Profile:
    """Read a profile.

    Args:
        fingerprint: of the model it is for; None accepts any.

    Raises:
        ProfileError: no path, unreadable, damaged, of another version of this package, or another
            model's.

    Example:
        >>> from nexusquant import load_profile
        >>> load_profile("no/such/file.safetensors")
        Traceback (most recent call last):
        nexusquant.errors.ProfileError: no/such/file.safetensors: not a readable profile (...).
    """
    path = profile_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = _header(path, file.metadata())
            if fingerprint is not None and header["fingerprint"] != fingerprint:
                raise ProfileError(
                    f"{path} is the profile of another model: it was built for fingerprint"
                    f" {header['fingerprint']}, this model has {fingerprint}. Build one with"
                    " `nexusquant calibrate`."
                )
            names = set(file.keys())
            layers = {
                int(index): LayerProfile(
                    _side(path, file, names, f"{index}.key"),
                    _side(path, file, names, f"{index}.value"),
                    float(inverse),
                    _rank_costs(path, file, names, index),
                )
                for index, inverse in header["inverse_residual"].items()
            }
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{path}: not a readable profile ({error}).") from error
    for index, layer in layers.items():
        if len(layer.key.weight) != len(layer.value.weight):
            raise ProfileError(
                f"{path}: damaged, keys and values of layer {index} differ in heads."
            )
    return Profile(
        header["fingerprint"], header["rope_page"], header["source"], header["tokens"], layers, True
    )  # fmt: skip


def profile_file(path: str | Path) -> Path:
    """A path with `~` expanded."""
    if not isinstance(path, (str, os.PathLike)):
        raise ProfileError(
            "a profile is given as a Profile or as the path of its file (str or Path), not as"
            f" {type(path).__name__}."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: the caller says that there is no such file
        return Path(path)


def _header(path: str | Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header: Any = json.loads((metadata or {})["nexusquant"])
        kinds = {"fingerprint": str, "rope_page": int, "source": str, "tokens": int}
        if header["format"] not in (_UNRANKED, FORMAT):
            raise ProfileError(
                f"{path} has format {header['format']}, this version of nexusquant reads {FORMAT}."
                " Build it again with `nexusquant calibrate`."
            )
        if not all(isinstance(header[name], kind) for name, kind in kinds.items()):
            raise TypeError
        layers = header["inverse_residual"]
        if not layers or not all(
            type(x) in (int, float) and 0 < float(x) < math.inf and int(i) >= 0
            for i, x in layers.items()
        ):
            raise ValueError
    except ProfileError:
        raise
    except _BAD_HEADER as error:
        raise ProfileError(f"{path}: not a profile of nexusquant, or damaged.") from error
    return dict(header)


def _rank_costs(path: str | Path, file: Any, names: set[str], index: str) -> RankCosts | None:
    wanted = [f"{index}.{side}.{_RANKED}" for side in SIDES]
    found: list[Tensor] = [file.get_tensor(name) for name in wanted if name in names]
    if not found:
        return None
    shape = (len(file.get_tensor(f"{index}.key.mean")), RANKS + 1)
    ok = len(found) == len(SIDES) and all(
        tuple(x.shape) == shape
        and x.dtype == torch.float32
        and bool(((x >= 0) & x.isfinite()).all())
        for x in found
    )
    if not ok:
        raise ProfileError(f"{path}: damaged, the costs by rank of layer {index} are wrong.")
    return found[0], found[1]


def _side(path: str | Path, file: Any, names: set[str], prefix: str) -> Side:
    if missing := [name for name in _FIELDS if f"{prefix}.{name}" not in names]:
        raise ProfileError(f"{path}: damaged, {prefix} lacks {', '.join(missing)}.")
    tensors: list[Tensor] = [file.get_tensor(f"{prefix}.{name}") for name in _FIELDS]
    forward = tensors[0]
    heads, dim = (*forward.shape, 0, 0)[:2]
    square, groups = (heads, dim, dim), (heads, dim // 8)
    shapes = [square, square, (heads, dim), groups, (heads,), groups]
    ok = (
        heads > 0
        and dim > 0
        and dim % 8 == 0
        and all(
            tuple(x.shape) == shape and x.dtype == torch.float32 and bool(torch.isfinite(x).all())
            for x, shape in zip(tensors, shapes, strict=True)
        )
    )
    if ok:  # the product's error grows with the norms of the two
        product = forward.double() @ tensors[1].double()
        error = (product - torch.eye(dim)).abs().amax((1, 2))
        size = forward.double().norm(dim=(1, 2)) * tensors[1].double().norm(dim=(1, 2))
        ok = bool((error <= 1e-4 * size.clamp(max=1e4)).all())
    if not ok or min(float(x.min()) for x in tensors[3:]) < 0:
        raise ProfileError(f"{path}: damaged, {prefix} has wrong shapes or values.")
    return Side(*tensors)
