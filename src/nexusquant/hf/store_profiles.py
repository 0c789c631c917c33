"""Storage profiles: gathered while a model reads, kept in the user's cache directory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nexusquant.compressor import Chunk
from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.profile import QueryMoments, StoreProfile, profile_from_bytes
from nexusquant.errors import ProfileError
from nexusquant.folders import cache_dir
from nexusquant.frame import KeyFrame
from nexusquant.hf.collecting import Collector
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.profile import Profile
from nexusquant.profile_store import digest_of, kept_path, profile_file, write
from nexusquant.residual import OutputSide
from nexusquant.statistics import LayerStatistics
from nexusquant.tokens import narrowed

StoreProfileLike = StoreProfile | str | Path | None
_TOKENS = 32768
"""Tokens whose keys and values are held per layer while a profile is built."""

_lock = threading.RLock()
_known: weakref.WeakKeyDictionary[nn.Module, StoreProfile] = weakref.WeakKeyDictionary()


class StoreCollector(Collector):
    """Gathers what a storage profile is built from; knows no profile meanwhile."""

    def __init__(self, model: nn.Module, pieces: int) -> None:
        super().__init__(model, page=1)
        self.samples: dict[int, list[Sample]] = {}
        self.queries: dict[int, list[QueryMoments]] = {}
        self._each = _TOKENS // pieces

    def obtain(
        self, chunk: Chunk, frame: KeyFrame, sinks: int, output: Callable[[], OutputSide] | None
    ) -> Profile | None:
        """Adds the first row's keys, values and queries without RoPE, and their statistics."""
        before = len(self.statistics.get(chunk.layer_idx, []))
        super().obtain(chunk, frame, sinks, output)
        if len(self.statistics.get(chunk.layer_idx, [])) == before or chunk.queries is None:
            return None
        tokens = chunk.keys.shape[2]
        skip = sinks if chunk.start == 0 else 0
        some = slice(skip, skip + self._each)
        slots = torch.arange(chunk.start, chunk.start + tokens, device=chunk.keys.device)
        keys = frame.enter(chunk.keys[:1, :, some], slots[some].view(1, 1, -1))[0]
        held = (narrowed(x, torch.float16).cpu() for x in (keys, chunk.values[0, :, some]))
        sample = Sample(*held)
        self.samples.setdefault(chunk.layer_idx, []).append(sample)
        last = slots[-chunk.queries.shape[2] :].view(1, 1, -1)
        queries = frame.remove(chunk.queries[:1], last)[0]
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        covariance = centred.mT @ centred / queries.shape[1]
        moments = QueryMoments(mean.cpu(), covariance.cpu())
        self.queries.setdefault(chunk.layer_idx, []).append(moments)
        return None

    def store_profile_of(
        self, model: nn.Module, source: str, tokens: int, report: Callable[[str], None]
    ) -> StoreProfile:
        """The storage profile of everything seen.

        Raises:
            ProfileError: nothing was seen.
        """
        layers = {
            index: LayerStatistics.mean(parts).profile()
            for index, parts in sorted(self.statistics.items())
        }
        queries = {index: _mean(parts) for index, parts in self.queries.items()}
        return build_profile(
            layers, self.samples, queries, fingerprint(model), source, tokens, report
        )


def _mean(parts: list[QueryMoments]) -> QueryMoments:
    """Of several texts, each counting the same."""
    means = torch.stack([part.mean for part in parts])
    mean = means.mean(0)
    apart = means - mean
    between = torch.einsum("thd,the->hde", apart, apart) / len(parts)
    within = torch.stack([part.covariance for part in parts]).mean(0)
    return QueryMoments(mean, (within + between).bfloat16())


def remember_store_profile(model: nn.Module, profile: StoreProfile) -> None:
    """Use `profile` for prefixes of `model`."""
    with _lock:
        _known[model] = profile


def default_store_path(model_fingerprint: str) -> Path:
    """Where the storage profile of a model is looked for."""
    return cache_dir() / "profiles" / f"{model_fingerprint}-store.safetensors"


def save_store_profile(profile: StoreProfile, path: str | Path | None = None) -> Path:
    """Write a storage profile; the file appears whole or not at all.

    Args:
        path: default: where `save` and `load` will find it. One that is there is kept beside it,
            for the prefixes that were coded with it.

    Raises:
        ProfileError: not a storage profile, or the disk does not take it.

    Example:
        >>> from nexusquant import calibrate_store, save_store_profile
        >>> profile = calibrate_store(model, tokenizer, [text], pieces=1)
        >>> save_store_profile(profile).name.endswith("-store.safetensors")
        True
    """
    if not isinstance(profile, StoreProfile):
        raise ProfileError(f"not a storage profile but {type(profile).__name__}.")
    return write(profile.to_bytes(), path, lambda: default_store_path(profile.fingerprint))


def load_store_profile(path: str | Path) -> StoreProfile:
    """Read a storage profile.

    Raises:
        ProfileError: not there, not one, or damaged.

    Example:
        >>> from nexusquant import calibrate_store, load_store_profile, save_store_profile
        >>> profile = calibrate_store(model, tokenizer, [text], pieces=1)
        >>> load_store_profile(save_store_profile(profile)).digest == profile.digest
        True
    """
    try:
        data = profile_file(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise ProfileError(f"{path}: cannot read the storage profile ({error}).") from error
    return profile_from_bytes(data, str(path))


def find_store_profile(model: nn.Module, given: StoreProfileLike = None) -> StoreProfile | None:
    """The storage profile to use: given, known, or stored in the user's cache directory.

    Raises:
        ProfileError: a given one is another model's, or one is damaged.
    """
    mine = fingerprint(model)
    if given is not None:
        profile = given if isinstance(given, StoreProfile) else load_store_profile(given)
        if profile.fingerprint != mine:
            raise ProfileError(
                f"the storage profile given was built for fingerprint {profile.fingerprint}, this"
                f" model has {mine}: it is another model's."
            )
        return profile
    with _lock:
        known = _known.get(model)
        if known is not None and known.fingerprint == mine:
            return known
        try:
            path = default_store_path(mine)
            found = load_store_profile(path) if path.is_file() else None
        except (OSError, RuntimeError):  # a directory that cannot be looked into, no home
            return None
        if found is not None:
            _known[model] = found
        return found


def need_store_profile(model: nn.Module, given: StoreProfileLike = None) -> StoreProfile:
    """The storage profile to use. Raises `ProfileError` if there is none."""
    found = find_store_profile(model, given)
    if found is None:
        raise ProfileError(
            "this model has no storage profile yet: run `nexusquant calibrate MODEL --store` once,"
            " or save_store_profile(calibrate_store(model, tokenizer, texts))."
        )
    return found


def store_profile_file(model_fingerprint: str, digest: str) -> Path | None:
    """The file of a storage profile in the user's cache directory, if it is there."""
    try:
        current = default_store_path(model_fingerprint)
        if current.is_file() and digest_of(current.read_bytes()) == digest:
            return current
        older = kept_path(current, digest)
        return older if older.is_file() else None
    except (OSError, RuntimeError):  # a directory that cannot be looked into, no home
        return None


def matching_store_profile(
    model: nn.Module, digest: str, given: StoreProfileLike, held: Callable[[], bytes | None]
) -> StoreProfile:
    """The storage profile of a digest: given, that of the file, known, or kept by the user.

    Args:
        held: the file of one that came with the prefix, if one did.

    Raises:
        ProfileError: it is none of them, or damaged.
    """
    mine = fingerprint(model)
    with _lock:
        known = _known.get(model)
    found = None
    if given is not None:
        found = need_store_profile(model, given)
    elif known is not None and known.fingerprint == mine and known.digest == digest:
        found = known
    elif (file := store_profile_file(mine, digest)) is not None:
        found = load_store_profile(file)
    elif (data := held()) is not None:
        found = need_store_profile(model, profile_from_bytes(data, "the profile of this prefix"))
    if found is None or found.digest != digest:
        there = "it is not there" if found is None else f"the one given or found is {found.digest}"
        raise ProfileError(
            f"this prefix was coded with storage profile {digest!r:.80}; {there}. Give its file"
            " (store_profile=..., --store-profile), or save the prefix with the profile"
            " (embed_profile=True)."
        )
    return found
