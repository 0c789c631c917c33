"""The profile that a prefix needs: in its file, beside it in a store, or kept by the user."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusquant.entropy.profile import StoreProfile
from nexusquant.hf.store_profiles import StoreProfileLike, store_profile_file
from nexusquant.nxq import Reader
from nexusquant.prefix.profile_identity import is_kept, profile_digest
from nexusquant.profile import Profile
from nexusquant.profile_store import profile_bytes
from nexusquant.stores import Store

STREAM = "profile"


@dataclass(frozen=True)
class Companion:
    """The profile of a prefix that is being saved.

    Attributes:
        digest: empty if there is none.
        kept: whether other processes of this user will find it.
        data: its file.
    """

    digest: str
    kept: bool
    data: Callable[[], bytes]

    @staticmethod
    def of_store(profile: StoreProfile, given: StoreProfileLike) -> Companion:
        """Of an entropy-coded prefix."""
        file = store_profile_file(profile.fingerprint, profile.digest)
        kept = file is not None or isinstance(given, (str, Path))
        return Companion(profile.digest, kept, profile.to_bytes)

    @staticmethod
    def of_live(profile: Profile | None) -> Companion:
        """Of a live cache."""
        if profile is None:
            return Companion("", True, bytes)
        return Companion(profile_digest(profile), is_kept(profile), lambda: profile_bytes(profile))

    def along(self, embed: bool | None, in_store: bool) -> tuple[bytes, bytes]:
        """What goes into the prefix's file, and what beside it into the store.

        Args:
            embed: as in `save`.
        """
        if not self.digest or embed is False or (embed is None and self.kept and not in_store):
            return b"", b""
        return (b"", self.data()) if embed is None and in_store else (self.data(), b"")


def keep_beside(store: Store, digest: str, data: bytes) -> None:
    """Put a profile into a store, unless it is there; looking at it is a use, which keeps it."""
    key = _key(digest)
    if store.get_range(key, 0, 1) is None:
        store.put(key, data)


def held(reader: Reader, place: Any, digest: str) -> bytes | None:
    """The profile that came with a prefix, if one did.

    Args:
        place: where the prefix is.
        digest: which one, as a file says that may be hostile.
    """
    if STREAM in reader.streams:
        return bytes(reader.read(STREAM, 0))
    if (
        isinstance(place, Store)
        and isinstance(digest, str)
        and re.fullmatch("[0-9a-f]{32}", digest)
    ):
        return place.get(_key(digest))
    return None


def _key(digest: str) -> str:
    return f"profile-{digest}.safetensors"
