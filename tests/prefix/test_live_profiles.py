"""Codes are read with the profile that they were made with, and with no other."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexusquant import (
    FormatError,
    NexusCache,
    ProfileError,
    load,
    load_profile,
    nxq,
    save,
    save_profile,
)
from nexusquant.hf.profiles import remember_profile
from nexusquant.prefix.profile_identity import profile_digest
from nexusquant.stores import DirectoryStore
from tests.hf.models import prompt, tiny
from tests.nxq.cases import contents
from tests.prefix.live_cases import feed, go_on_alike, loaded, packed


@pytest.fixture
def made() -> tuple[Any, Any]:
    """A model and a cache that built its profile."""
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(500))
    assert cache.profile is not None
    return model, cache


def test_the_digest_is_that_of_the_content(made: tuple[Any, Any], tmp_path: Path) -> None:
    profile = made[1].profile
    again = load_profile(save_profile(profile, tmp_path / "p"))
    assert again is not profile
    assert profile_digest(again) == profile_digest(profile)
    again = load_profile(tmp_path / "p")
    again.layers[1].value.mean[0, 0] += 1
    assert profile_digest(again) != profile_digest(profile)


def test_nowhere_to_be_found(made: tuple[Any, Any]) -> None:
    data = packed(made[1])
    with pytest.raises(ProfileError, match=f"{profile_digest(made[1].profile)}; there is none"):
        loaded(data, tiny())


def test_given_or_stored(made: tuple[Any, Any], tmp_path: Path) -> None:
    _, cache = made
    data, twin = packed(cache), tiny()
    path = save_profile(cache.profile, tmp_path / "p")
    for given in (path, load_profile(path)):
        again = loaded(data, twin, given)
        assert packed(again) == data
    save_profile(cache.profile)
    go_on_alike(twin, (cache, loaded(data, twin)))


def test_stored_while_the_model_knows_another(made: tuple[Any, Any]) -> None:
    data, twin = packed(made[1]), tiny()
    other = NexusCache(twin)
    feed(twin, other, prompt(600, seed=7))
    remember_profile(twin, other.profile)
    with pytest.raises(ProfileError, match=profile_digest(other.profile)):
        loaded(data, twin)
    save_profile(made[1].profile)
    assert packed(loaded(data, twin)) == data
    assert NexusCache(twin).profile is other.profile


def test_another_one_given_is_refused(made: tuple[Any, Any]) -> None:
    model, cache = made
    twin = tiny()
    other = NexusCache(twin)
    feed(twin, other, prompt(600, seed=7))
    for data in (packed(cache), packed(cache, with_profile=True)):
        with pytest.raises(ProfileError, match=profile_digest(other.profile)):
            loaded(data, model, other.profile)
    strange = tiny(seed=1)
    stranger = NexusCache(strange)
    feed(strange, stranger, prompt(500))
    with pytest.raises(ProfileError, match="another model's"):
        loaded(packed(cache), model, stranger.profile)


def test_what_no_other_process_would_find_goes_along(made: tuple[Any, Any], tmp_path: Path) -> None:
    _, cache = made
    saved = save(cache, tmp_path / "p")
    assert saved.embedded
    assert saved.profile_nbytes > 10_000
    assert "MiB are the model's profile" in str(saved)
    twin = tiny()  # as in another process: it knows no profile
    go_on_alike(twin, (copy.deepcopy(cache), load(tmp_path / "p", twin)))
    save_profile(cache.profile)
    again = save(cache, tmp_path / "q")
    assert (again.embedded, again.profile_nbytes) == (False, 0)
    assert again.nbytes < saved.nbytes - saved.profile_nbytes + 100
    save_profile(replace(cache.profile, tokens=7))  # in its place; it stays beside it
    third = tiny()
    go_on_alike(third, (cache, load(tmp_path / "q", third)))


def test_beside_it_in_a_store(made: tuple[Any, Any], tmp_path: Path) -> None:
    _, cache = made
    with DirectoryStore(tmp_path) as store:
        saved = save(cache, store, key="p")
        assert (saved.embedded, saved.nbytes) == (False, store.size("p"))
        assert store.size(f"profile-{profile_digest(cache.profile)}.safetensors") == (
            saved.profile_nbytes
        )
        twin = tiny()
        go_on_alike(twin, (cache, load(store, twin, key="p")))
        store.delete(f"profile-{profile_digest(cache.profile)}.safetensors")
        with pytest.raises(ProfileError, match="there is none"):
            load(store, tiny(), key="p")


def test_within_the_file(made: tuple[Any, Any]) -> None:
    _, cache = made
    data, twin = packed(cache, with_profile=True), tiny()
    again = loaded(data, twin)
    assert profile_digest(again.profile) == profile_digest(cache.profile)
    go_on_alike(twin, (cache, again))
    assert NexusCache(twin).profile is None


def test_a_damaged_one_within_the_file(made: tuple[Any, Any]) -> None:
    meta, streams, _ = contents(nxq.Reader.open(packed(made[1], with_profile=True)))
    whole = bytearray(streams["profile"][0])
    for at in (3, 20, len(whole) // 2, len(whole) - 1):
        streams["profile"] = [bytes([*whole[:at], whole[at] ^ 64, *whole[at + 1 :]])]
        with pytest.raises((FormatError, ProfileError)):
            loaded(nxq.pack(meta, streams), tiny())
    streams["profile"] = []
    with pytest.raises(FormatError):
        loaded(nxq.pack(meta, streams), tiny())


def test_a_cache_that_had_none_gets_none(made: tuple[Any, Any]) -> None:
    twin = tiny()
    cache = NexusCache(twin)
    feed(twin, cache, prompt(20))
    data = packed(cache)
    again = loaded(data, made[0])
    assert again.profile is None
    go_on_alike(made[0], (cache, again))
