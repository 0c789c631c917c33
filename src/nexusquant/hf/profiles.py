"""The profile of a cache: the model's, looked up once, or built from its own first prompt."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexusquant.compressor import Chunk
from nexusquant.config import CompressionConfig
from nexusquant.errors import ConfigError, ProfileError
from nexusquant.frame import KeyFrame
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.profile import Profile
from nexusquant.profile_store import default_path, load_profile
from nexusquant.residual import OutputSide
from nexusquant.sampling import PREFILL, Sampling
from nexusquant.statistics import MIN_TOKENS, LayerStatistics, layer_statistics, varied

ProfileLike = Profile | str | Path | None
"""A profile, its file, or one of `MODES`; None: what `NEXUSQUANT_PROFILE` says, else "auto"."""

MODES = ("auto", "first-prompt", "none")
"""Where a profile comes from that is neither known nor stored: the model is calibrated on the
package's own text before its first cache is used; every cache builds its own while its first long
prompt is compressed; or there is none."""

FIRST_PROMPT = "first prompt"
"""Source of profiles that a prompt has built: for one cache, in whose bytes they count."""

_lock = threading.RLock()
_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Profile]] = weakref.WeakKeyDictionary()
_files: weakref.WeakValueDictionary[tuple[str, int, int, str], Profile] = (
    weakref.WeakValueDictionary()
)


def remember_profile(model: nn.Module, profile: Profile) -> None:
    """Use `profile` for new caches of `model`."""
    with _lock:
        _known.setdefault(model, {})[profile.rope_page] = profile


def find_profile(model: nn.Module, rope_page: int, given: ProfileLike = None) -> Profile | None:
    """The profile to use: given, known, or stored in the user's cache directory.

    Raises:
        ProfileError: a given one does not fit the model or the key frame, or one is damaged.
    """
    if given is not None:
        mine = fingerprint(model)
        profile = given if isinstance(given, Profile) else _from_file(given, mine)
        if profile.fingerprint != mine:
            raise ProfileError(
                f"the profile given is another model's: it was built for fingerprint"
                f" {profile.fingerprint}, this model has {mine}."
            )
        if profile.rope_page != rope_page:
            raise ProfileError(
                f"the profile given was built with rope_page={profile.rope_page}, the cache is"
                f" configured with rope_page={rope_page}."
            )
        return _of_layers(profile, model)
    with _lock:
        known, mine = _known.setdefault(model, {}), fingerprint(model)
        if rope_page in known and known[rope_page].fingerprint != mine:
            del known[rope_page]  # the weights have changed since
        if rope_page not in known:
            path = _stored(mine, rope_page)
            if path is None:
                return None
            try:
                known[rope_page] = _of_layers(load_profile(path, mine), model)
            except ProfileError as error:
                raise ProfileError(
                    f"{error} It is the one that caches of this model use by default: delete it, or"
                    " build it again with `nexusquant calibrate`."
                ) from error
        return known[rope_page]


def _stored(fingerprint: str, rope_page: int) -> Path | None:
    """Where a profile is stored; a cache directory that cannot be looked into has none."""
    try:
        path = default_path(fingerprint, rope_page)
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


def _of_layers(profile: Profile, model: nn.Module) -> Profile:
    """A profile whose layers the model has."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if isinstance(count, int) and max(profile.layers, default=0) >= count:
        raise ProfileError(
            f"the profile has a layer {max(profile.layers)}, the model has {count}: it is damaged."
        )
    return profile


def _from_file(path: str | Path, fingerprint: str) -> Profile:
    """A file is read again only if it has changed."""
    try:
        status = Path(path).stat()
    except (OSError, TypeError, ValueError):
        return load_profile(path, fingerprint)  # says what is wrong, or expands ~
    key = str(Path(path).resolve()), status.st_mtime_ns, status.st_size, fingerprint
    with _lock:
        known = _files.get(key)
        if known is None:
            known = _files[key] = load_profile(path, fingerprint)
        return known


class ProfileBook:
    """The profile that one cache uses: the model's, or what its own first long prompt builds."""

    def __init__(
        self, model: nn.Module, page: int, profile: Profile | None = None, wanted: bool = True
    ) -> None:
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self.page, self.profile, self.wanted = page, profile, wanted
        self.monotonous = False  # the pass under way: too few different tokens

    @classmethod
    def of(
        cls, model: nn.Module, config: CompressionConfig, given: ProfileLike = None
    ) -> ProfileBook:
        """The book of a new cache. Raises `ProfileError` as `find_profile` does."""
        wanted = config.codec == "e8" and config.transform == "klt"
        mode = _mode(given)
        if mode == "none":
            return cls(model, config.rope_page, None, wanted=False)
        if mode == "auto" and wanted:
            from nexusquant.hf.automatic import automatic_profile  # which makes caches itself

            return cls(model, config.rope_page, automatic_profile(model, config.rope_page))
        find = wanted or mode is None  # a wrong one is refused even where unused
        own = None if mode else given
        found = find_profile(model, config.rope_page, own) if find else None
        return cls(model, config.rope_page, found if wanted else None, wanted)

    def obtain(
        self, chunk: Chunk, frame: KeyFrame, sinks: int, output: Callable[[], OutputSide] | None
    ) -> Profile | None:
        """The profile, if it knows the chunk's layer or can be built from this chunk."""
        if not self.wanted or chunk.queries is None or output is None:
            return self.profile
        if self.profile is not None and chunk.layer_idx in self.profile.layers:
            self.end_pass(failed=False)  # a call of the inner model, whose end nobody sees
        known = self.profile is not None and (
            self.profile.complete or chunk.layer_idx in self.profile.layers
        )
        if known or self.monotonous or _length(chunk) < MIN_TOKENS:
            return self.profile
        if not (self.profile and self.profile.layers) and not _varied(chunk):
            self.monotonous = True
            return self.profile
        model = None if self._model is None else self._model()
        if self.profile is None and model is not None:
            self.profile = find_profile(model, self.page) or Profile(
                fingerprint(model), self.page, FIRST_PROMPT, _length(chunk)
            )
        if self.profile is None or self.profile.complete:
            return self.profile
        statistics = chunk_statistics(chunk, frame, sinks, output(), PREFILL)
        if statistics is not None:
            self.profile.layers[chunk.layer_idx] = statistics.profile()
        return self.profile

    def end_pass(self, failed: bool) -> None:
        """A forward pass is over: what it built is complete, or void."""
        self.monotonous = False
        if self.profile is None or self.profile.complete:
            return
        if failed or not self.profile.layers:
            self.profile = None
            return
        self.profile.complete = True

    @property
    def own(self) -> Profile | None:
        """The profile, if it is this cache's alone."""
        own = self.profile is not None and self.profile.source == FIRST_PROMPT
        return self.profile if own else None

    def forget(self) -> None:
        """The cache is reset: its next prompt shall get what it would get alone."""
        if self.own is not None:
            self.profile = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ProfileBook:
        return self  # a copied cache goes on with the same profile

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def attach(self, model: nn.Module) -> None:
        """Belong to `model`, after unpickling."""
        self._model = weakref.ref(model)


def default_mode() -> str:
    """Which of `MODES` is in force where nothing is given.

    Raises:
        ConfigError: `NEXUSQUANT_PROFILE` is none of them.
    """
    mode = os.environ.get("NEXUSQUANT_PROFILE") or "auto"
    if mode not in MODES:
        raise ConfigError(f"NEXUSQUANT_PROFILE={mode}: must be one of {', '.join(MODES)}.")
    return mode


def _mode(given: ProfileLike) -> str | None:
    """One of `MODES`, None if `given` is a profile or a file.

    Raises:
        ConfigError: it is neither.
    """
    if given is None:
        return default_mode()
    if isinstance(given, str) and given in MODES:
        return given
    if not isinstance(given, (Profile, str, Path)):
        raise ConfigError(
            f"profile={given!r}: must be one of {', '.join(map(repr, MODES))}, a profile's file, or"
            " a Profile."
        )
    return None


def _varied(chunk: Chunk) -> bool:
    row = 0 if chunk.valid is None else int(chunk.valid.sum(-1).argmax())
    values = chunk.values[row]
    return varied(values if chunk.valid is None else values[:, chunk.valid[row]])


def _length(chunk: Chunk) -> int:
    """Real tokens of the longest row."""
    return chunk.keys.shape[2] if chunk.valid is None else int(chunk.valid.sum(-1).max())


def chunk_statistics(
    chunk: Chunk, frame: KeyFrame, sinks: int, output: OutputSide, sampling: Sampling
) -> LayerStatistics | None:
    """None if they are not finite: such input is refused where it is coded."""
    assert chunk.queries is not None
    found = layer_statistics(
        chunk.keys, chunk.values, chunk.queries, start=chunk.start, valid=chunk.valid,
        frame=frame, sinks=sinks, scaling=chunk.scaling, softcap=chunk.softcap, output=output,
        sampling=sampling,
    )  # fmt: skip
    tensors = [*vars(found.key).values(), *vars(found.value).values(), *(found.rank_costs or ())]
    return found if all(bool(torch.isfinite(x).all()) for x in tensors) else None
