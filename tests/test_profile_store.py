"""Profiles as files: exact round trip, whole or not at all, and every kind of bad file refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nexusquant import profile_store
from nexusquant.errors import NexusQuantError, ProfileError
from nexusquant.profile import LayerProfile, Profile, Side
from nexusquant.profile_store import FORMAT, cache_dir, default_path, load_profile, save_profile

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def side(heads: int, dim: int) -> Side:
    forward = torch.randn(heads, dim, dim)
    return Side(
        forward, forward.double().inverse().float(), torch.randn(heads, dim),
        torch.rand(heads, dim // 8), torch.rand(heads), 1 + torch.rand(heads, dim // 8),
    )  # fmt: skip


def profile(**changes: Any) -> Profile:
    layers = {
        3: LayerProfile(side(2, 16), side(2, 24), 0.1 + 0.2),
        0: LayerProfile(side(1, 8), side(1, 8), 1e-7),
        11: LayerProfile(side(4, 8), side(4, 8)),
    }
    return replace(Profile("abc123", 32, "own text, “quoted”", 2048, layers, True), **changes)


def same(a: Profile, b: Profile) -> bool:
    tensors = [
        [x for one in p.layers.values() for s in (one.key, one.value) for x in vars(s).values()]
        for p in (a, b)
    ]
    names = "fingerprint", "rope_page", "source", "tokens", "complete"
    return (
        all(getattr(a, name) == getattr(b, name) for name in names)
        and list(a.layers) == list(b.layers)
        and all(a.layers[i].inverse_residual == b.layers[i].inverse_residual for i in a.layers)
        and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
    )


def edit(path: Path, change: Edit) -> None:
    """Rewrite a profile after `change(tensors, header)`."""
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())  # the handle is not iterable itself
        tensors = {name: file.get_tensor(name).clone() for name in names}
        header = json.loads(file.metadata()["nexusquant"])
    change(tensors, header)
    save_file(tensors, path, {"nexusquant": json.dumps(header)})


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


@pytest.mark.skipif(
    os.geteuid() == 0, reason="file permissions do not bind root: the write would succeed"
)
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ProfileError, match="cannot write"):
            save_profile(profile(), tmp_path / "p")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_the_old_file_survives_a_failed_write(
    stored: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = stored.read_bytes()

    def half(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(profile_store, "save_file", half)
    with pytest.raises(ProfileError if isinstance(error, OSError) else KeyboardInterrupt):
        save_profile(profile(tokens=1), stored)
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


# -- refused when reading


def test_another_models_profile(stored: Path) -> None:
    with pytest.raises(ProfileError, match=r"another model.*abc123, this model has zzz.*calibrate"):
        load_profile(stored, "zzz")


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "1", None])
def test_another_format(stored: Path, version: object) -> None:
    edit(stored, lambda _, header: header.update(format=version))
    with pytest.raises(ProfileError, match=rf"format {version}, .* reads {FORMAT}.*calibrate"):
        load_profile(stored)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files(stored: Path, share: float) -> None:
    data = stored.read_bytes()
    stored.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ProfileError, match="not a readable profile"):
        load_profile(stored)


@pytest.mark.parametrize("seed", range(5))
def test_garbage(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    path = tmp_path / "p"
    path.write_bytes(bytes(torch.randint(0, 256, (5000,)).tolist()))
    with pytest.raises(ProfileError, match="not a readable profile"):
        load_profile(path)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ProfileError, match="not a readable profile"):
            load_profile(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"nexusquant": ""},
        {"nexusquant": "{"},
        {"nexusquant": "[1]"},
        {"nexusquant": "3"},
        {"nexusquant": "[" * 200_000},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_safetensors_of_something_else(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ProfileError, match="not a profile of nexusquant, or damaged"):
        load_profile(path)


BAD_HEADERS: list[dict[str, Any]] = [
    {"fingerprint": 3}, {"rope_page": "32"}, {"rope_page": None}, {"source": []}, {"tokens": 1.5},
    {"inverse_residual": None}, {"inverse_residual": [0.1]}, {"inverse_residual": {"x": 0.1}},
    {"inverse_residual": {"-1": 0.1}}, {"inverse_residual": {"0": -1.0}},
    {"inverse_residual": {"0": float("nan")}}, {"inverse_residual": {"0": float("inf")}},
    {"inverse_residual": {"0": "much"}}, {"inverse_residual": {"0": None}},
    {"inverse_residual": {"0": 0}}, {"inverse_residual": {}}, {"inverse_residual": {"0": True}},
    {"inverse_residual": {"0": 10**400}}, {"inverse_residual": {"0": "1.0"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD_HEADERS, ids=str)
def test_headers_that_make_no_sense(stored: Path, changes: dict[str, Any]) -> None:
    edit(stored, lambda _, header: header.update(changes))
    with pytest.raises(ProfileError, match="not a profile of nexusquant, or damaged"):
        load_profile(stored)


@pytest.mark.parametrize(
    "name", ["format", "fingerprint", "rope_page", "source", "tokens", "inverse_residual"]
)
def test_headers_that_lack_something(stored: Path, name: str) -> None:
    edit(stored, lambda _, header: header.pop(name))
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(stored)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors, _: tensors.update({name: change(tensors[name]).contiguous()})


def poke(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_fill(-1, torch.tensor([0]), value)


DAMAGE: dict[str, Edit] = {
    "missing tensor": lambda tensors, _: tensors.pop("3.value.mean"),
    "unknown layer": lambda _, header: header["inverse_residual"].update({"7": 1.0}),
    "nan": put("3.key.forward", poke(float("nan"))),
    "inf": put("0.value.weight", poke(float("inf"))),
    "half": put("3.key.inverse", Tensor.half),
    "integers": put("3.value.mean", Tensor.long),
    "not square": put("3.key.forward", lambda x: x[..., :8]),
    "other dim": put("3.key.inverse", lambda x: x[:, :8, :8]),
    "other heads": put("11.key.weight", lambda x: x[:3]),
    "other groups": put("3.value.variance", lambda x: x[:, :1]),
    "flat": put("3.value.forward", lambda x: x[0]),
    "scalar": put("3.value.forward", lambda x: x.sum()),
    "odd dim": lambda tensors, _: tensors.update(
        {f"0.key.{name}": tensors[f"0.key.{name}"][:, :4, :4].contiguous()
         for name in ("forward", "inverse")}
    ),
    "zero inverse": put("3.key.inverse", torch.zeros_like),
    "inverse of something else": put("3.value.inverse", lambda x: x.flip(0)),
    "negative variance": put("3.value.variance", poke(-1.0)),
    "negative weight": put("3.value.weight", poke(-1.0)),
    "fewer heads than values": lambda tensors, _: tensors.update(
        {name: x[:3].contiguous() for name, x in tensors.items() if name.startswith("11.key")}
    ),
    "no heads": lambda tensors, _: tensors.update(
        {name: x[:0].contiguous() for name, x in tensors.items() if name.startswith("11.key")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit(stored: Path, damage: str) -> None:
    edit(stored, DAMAGE[damage])
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(stored)


def test_profile_errors_belong_to_the_family() -> None:
    assert issubclass(ProfileError, NexusQuantError)
    assert issubclass(ProfileError, ValueError)
