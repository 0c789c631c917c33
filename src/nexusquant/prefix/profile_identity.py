"""Which profile codes refer to: a digest of its content, and finding the profile that has it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from torch import nn

from nexusquant.errors import FormatError, ProfileError
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.profiles import ProfileLike, find_profile
from nexusquant.profile import SIDES, Profile
from nexusquant.profile_store import default_path, kept, load_profile

Held = Callable[[], bytes | None]

_digests: weakref.WeakKeyDictionary[Profile, str] = weakref.WeakKeyDictionary()


def profile_digest(profile: Profile) -> str:
    """32 hex digits of all tensors of a complete profile: what codes mean, and what following
    tokens are coded like."""
    if profile not in _digests:
        digest = blake2b(digest_size=16)
        for index, layer in sorted(profile.layers.items()):
            digest.update(f"layer {index} {float(layer.inverse_residual)!r} ".encode())
            tensors = {
                f"{name} {field}": x
                for name in SIDES
                for field, x in vars(getattr(layer, name)).items()
            }
            tensors |= zip(SIDES, layer.rank_costs or (), strict=False)
            for name, x in tensors.items():
                digest.update(f"{name} {tuple(x.shape)} ".encode())
                digest.update(x.detach().float().cpu().contiguous().numpy())
        _digests[profile] = digest.hexdigest()
    return _digests[profile]


def profile_of_bytes(data: bytes, model: nn.Module) -> Profile:
    """Inverse of `nexusquant.profile_store.profile_bytes`.

    Raises:
        FormatError: it is none of this model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile"
        path.write_bytes(data)
        try:
            return load_profile(path, fingerprint(model))
        except ProfileError as error:
            raise FormatError(f"its profile: {error}") from error


def matching_profile(
    model: nn.Module, page: int, wanted: str, given: ProfileLike, held: Held
) -> Profile:
    """The profile of a digest: given, known to the model, stored by the user, or held by the file.

    Args:
        held: the file of a profile that came with the codes, if one did.

    Raises:
        ProfileError: none of them is it.
    """
    seen = []
    for profile in _candidates(model, page, given, held):
        if profile_digest(profile) == wanted:
            return profile
        seen.append(profile_digest(profile))
    have = f"there is {', '.join(seen)}" if seen else "there is none"
    raise ProfileError(
        f"these codes need the model's profile {wanted}; {have}. Give the file of the profile that"
        " the cache was made with (profile=...), or save the cache with its profile."
    )


def _candidates(model: nn.Module, page: int, given: ProfileLike, held: Held) -> Iterator[Profile]:
    found = find_profile(model, page, given)
    if found is not None and found.complete:
        yield found
    if given is not None:
        return
    mine = fingerprint(model)
    yield from _kept(mine, page)
    data = held()
    if data is not None:
        yield profile_of_bytes(data, model)


def is_kept(profile: Profile) -> bool:
    """Whether it is in the user's cache directory."""
    kept = _kept(profile.fingerprint, profile.rope_page)
    return any(profile_digest(x) == profile_digest(profile) for x in kept)


def _kept(model_fingerprint: str, page: int) -> Iterator[Profile]:
    """The user's profiles of a model; those that cannot be read are none of them."""
    with suppress(OSError, RuntimeError):  # a directory that cannot be looked into, no home
        for path in kept(default_path(model_fingerprint, page)):
            with suppress(ProfileError):
                yield load_profile(path, model_fingerprint)
