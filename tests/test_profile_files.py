"""Every kind of bad profile file is refused with an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nexusquant.errors import NexusQuantError, ProfileError
from nexusquant.profile_store import FORMAT, load_profile, save_profile
from tests.profile_cases import Edit, edit, profile


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save_profile(profile(), tmp_path / "p.safetensors")


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
    "costs by rank of one side": lambda tensors, _: tensors.pop("3.key.rank_costs"),
    "costs by rank of fewer ranks": put("3.value.rank_costs", lambda x: x[:, 1:].contiguous()),
    "costs by rank of fewer heads": put("3.value.rank_costs", lambda x: x[1:].contiguous()),
    "costs by rank in fp16": put("3.value.rank_costs", lambda x: x.half()),
    "negative cost by rank": put("3.key.rank_costs", poke(-1.0)),
    "infinite cost by rank": put("3.key.rank_costs", poke(float("inf"))),
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
