"""Profiles as files: exact round trip, in the right place, whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nexusquant.errors import ProfileError
from nexusquant.profile import LayerProfile
from nexusquant.profile_store import cache_dir, default_path, load_profile, save_profile
from tests.profile_cases import profile, same, side


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save_profile(profile(), tmp_path / "p.safetensors")


# -- round trip and places


def test_round_trip_is_exact(tmp_path: Path) -> None:
    known, path = profile(), tmp_path / "deep" / "er" / "p.safetensors"
    assert save_profile(known, str(path)) == path
    loaded = load_profile(str(path), "abc123")
    # JSON has its own order of layers; what belongs to which index is what counts.
    loaded.layers = {i: loaded.layers[i] for i in known.layers}
    assert same(loaded, known)
    assert [x.name for x in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_loaded_profiles_can_be_stored_again(stored: Path) -> None:
    before = stored.read_bytes()
    save_profile(load_profile(stored), stored)
    assert stored.read_bytes() == before, "equal profiles are equal files"


def test_files_without_costs_by_rank_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    known = profile()
    known.layers = {i: replace(layer, rank_costs=None) for i, layer in known.layers.items()}
    path = save_profile(known, tmp_path / "p")
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["nexusquant"])["format"] == 2
        assert not any("rank" in name for name in file.keys())  # noqa: SIM118
    loaded = load_profile(path)
    assert all(layer.rank_costs is None for layer in loaded.layers.values())


def test_views_and_transposes_are_stored_as_what_they_show(tmp_path: Path) -> None:
    wide = torch.randn(2, 16, 32)
    forward = wide[..., ::2]
    odd = replace(side(2, 16), forward=forward, inverse=forward.mT.contiguous().inverse().mT)
    known = profile(layers={0: LayerProfile(odd, side(2, 16))})
    assert same(load_profile(save_profile(known, tmp_path / "p")), known)


def test_the_default_place_is_the_users_cache(user_cache: Path) -> None:
    path = save_profile(profile())
    assert cache_dir() == user_cache
    assert path == default_path("abc123", 32) == user_cache / "profiles/abc123-page32.safetensors"
    assert load_profile(path, "abc123").tokens == 2048
    assert default_path("abc123", 0) != path


def test_without_xdg_the_cache_is_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_dir() == tmp_path / ".cache" / "nexusquant"


def test_any_fingerprint_if_none_is_given(stored: Path) -> None:
    assert load_profile(stored).fingerprint == "abc123"


# -- refused when writing


def test_a_cache_without_a_profile_has_none_to_save() -> None:
    with pytest.raises(ProfileError, match="run a long prompt"):
        save_profile(None)


@pytest.mark.parametrize("changes", [{"complete": False}, {"layers": {}}], ids=str)
def test_unfinished_profiles_are_not_stored(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="no layers yet"):
        save_profile(profile(**changes), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ProfileError, match=r"file/p: cannot write the profile \("):
        save_profile(profile(), tmp_path / "file" / "p")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ProfileError, match="cannot write the profile"):
        save_profile(profile(), name)


def test_without_a_home_a_path_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ProfileError, match="no cache directory to write to"):
        save_profile(profile())
    assert save_profile(profile(), tmp_path / "p").is_file()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(ProfileError, match="cannot write the profile"):
        save_profile(profile(), tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["p"], "no temporary file is left"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_the_old_file_survives_a_failed_write(
    stored: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = stored.read_bytes()

    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ProfileError if isinstance(error, OSError) else KeyboardInterrupt):
        save_profile(profile(tokens=1), stored)
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


# -- refused when reading
