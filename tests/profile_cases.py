"""Made-up profiles, and files of them to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nexusquant.profile import LayerProfile, Profile, Side
from nexusquant.rank_costs import RANKS, RankCosts

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def side(heads: int, dim: int) -> Side:
    forward = torch.randn(heads, dim, dim)
    return Side(
        forward, forward.double().inverse().float(), torch.randn(heads, dim),
        torch.rand(heads, dim // 8), torch.rand(heads), 1 + torch.rand(heads, dim // 8),
    )  # fmt: skip


def ranked(heads: int) -> RankCosts:
    return torch.rand(heads, RANKS + 1), torch.rand(heads, RANKS + 1)


def profile(**changes: Any) -> Profile:
    layers = {
        3: LayerProfile(side(2, 16), side(2, 24), 0.1 + 0.2, ranked(2)),
        0: LayerProfile(side(1, 8), side(1, 8), 1e-7),
        11: LayerProfile(side(4, 8), side(4, 8)),
    }
    return replace(Profile("abc123", 32, "own text, “quoted”", 2048, layers, True), **changes)


def same(a: Profile, b: Profile) -> bool:
    tensors = [
        [
            x
            for one in p.layers.values()
            for group in (vars(one.key).values(), vars(one.value).values(), one.rank_costs or ())
            for x in group
        ]
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
