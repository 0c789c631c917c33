"""Storage profiles as bytes, whole and damaged, and what they are built to be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.layer import LayerCode
from nexusquant.entropy.profile import LEVELS, StoreProfile, profile_from_bytes
from nexusquant.errors import FormatError, ProfileError
from nexusquant.profile import LayerProfile
from tests.entropy.cases import (
    HEADS,
    KEY,
    LAYERS,
    SHAPE,
    VALUE,
    page,
    profile,
    queries,
    side_of,
)

Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def edited(change: Edit) -> bytes:
    """The profile's bytes after `change(tensors, header)`."""
    data = profile().to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["nexusquant-store"])
    tensors = load(data)
    change(tensors, header)
    return save(tensors, {"nexusquant-store": json.dumps(header)})


def test_bytes_are_a_profile_again() -> None:
    data = profile().to_bytes()
    again = profile_from_bytes(data)
    assert again.to_bytes() == data
    assert again.digest == profile().digest
    for name in ("fingerprint", "source", "tokens", "shapes"):
        assert getattr(again, name) == getattr(profile(), name)
    assert again.shapes == dict.fromkeys(LAYERS, SHAPE)
    x = page(50)
    pages = LayerCode(profile(), 3, -12).encode(*x)
    code = LayerCode(again, 3, -12)
    assert code.encode(*x) == pages
    for a, b in zip(
        code.decode(pages, [50]), LayerCode(profile(), 3, -12).decode(pages, [50]), strict=True
    ):
        assert torch.equal(a, b)


def test_size_is_told() -> None:
    assert 0 < len(profile().to_bytes()) - profile().nbytes < 20_000


def test_digest_is_of_everything() -> None:
    assert replace(profile(), source="other").digest != profile().digest
    assert replace(profile(), rates=profile().rates / 2).digest != profile().digest


def _set(name: str, at: Any, value: float) -> Edit:
    return lambda tensors, header: tensors[name].__setitem__(at, value)


def _put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors, header: tensors.update({name: change(tensors[name]).contiguous()})


def _header(**values: Any) -> Edit:
    return lambda tensors, header: header.update(values)


DAMAGE: list[Edit] = [
    _header(format=2),
    _header(shapes={"0": [2, 16]}),
    _header(shapes={"0": [2, 16, 24, 1]}),
    _header(shapes={"0": [2, 16, 32]}),
    _header(shapes={"0": [-2, -16, 24]}),
    _header(shapes={"0": [1 << 40, 1 << 40, 8]}),
    _header(shapes={"0": [0, 16, 24]}),
    _header(shapes={"x": [2, 16, 24]}),
    _header(shapes={"7": [2, 16, 24]}),
    _header(shapes=[1]),
    _header(tokens="many"),
    _set("0.key.forward", (0, 0), torch.nan),
    _set("3.value.forward", (1, 0), torch.inf),
    _set("0.key.mean", 0, torch.inf),
    _set("0.key.scale", (), 0.0),
    _set("0.key.scale", (), -1.0),
    _set("0.key.scale", (), torch.nan),
    _set("0.key.decay", 0, 1.0),
    _set("0.key.decay", 0, -1.5),
    _set("0.value.level", (0, 3), LEVELS + 1),
    _set("0.value.level", (0, 3), -(2**15)),
    _set("0.value.group", (1, 0), 2**15 - 1),
    _set("tables.values", (0, 0, 0, 0), 0),
    _set("tables.cosets", (1, 2, 0), 0),
    _set("rates", 3, 1e9),
    _set("rates", 3, torch.nan),
    _set("rates", slice(None), torch.inf),
    _set("0.query.mean", (0, 0), torch.nan),
    _set("0.query.covariance", (0, 0, 0), torch.inf),
    _put("0.key.forward", lambda x: x.float()),
    _put("0.key.forward", lambda x: x[1:]),
    _put("0.key.level", lambda x: x.int()),
    _put("0.key.group", lambda x: x[:, 1:]),
    _put("0.key.decay", lambda x: x[None]),
    _put("0.query.mean", lambda x: x[:3]),
    _put("0.query.mean", lambda x: x[:0]),
    _put("0.query.covariance", lambda x: x.float()),
    _put("tables.values", lambda x: x[:, 1:]),
    _put("tables.cosets", lambda x: x.float()),
    _put("rates", lambda x: x[1:]),
    lambda tensors, header: tensors.pop("0.key.mean"),
    lambda tensors, header: tensors.pop("rates"),
    lambda tensors, header: tensors.pop("tables.values"),
    lambda tensors, header: header.pop("fingerprint"),
]


@pytest.mark.parametrize("change", DAMAGE)
def test_damaged_profiles_are_refused(change: Edit) -> None:
    with pytest.raises(ProfileError):
        profile_from_bytes(edited(change))


def test_an_edit_that_changes_nothing_is_taken() -> None:
    assert profile_from_bytes(edited(lambda tensors, header: None)).digest == profile().digest


@pytest.mark.parametrize("length", [0, 7, 8, 9, 100, 5000])
def test_cut_profiles_are_refused(length: int) -> None:
    with pytest.raises(ProfileError, match="not a storage profile, or damaged"):
        profile_from_bytes(profile().to_bytes()[:length])


def test_random_mutations_are_refused_or_decode() -> None:
    data, source = profile().to_bytes(), random.Random(0)
    pages = LayerCode(profile(), 0, -12).encode(*page(9))
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(source.randrange(1, 4)):  # the header is a third of it
            bad[source.randrange(len(bad) // source.choice((1, 10)))] = source.randrange(256)
        try:
            found = profile_from_bytes(bytes(bad))
            LayerCode(found, 0, -12).decode(list(pages), [9])
        except (ProfileError, FormatError):
            continue


def test_transforms_without_an_inverse_are_damaged() -> None:
    for change in (_set("0.key.forward", 5, 0.0), _set("0.key.scale", (), 1e-43)):
        code = LayerCode(profile_from_bytes(edited(change)), 0, -12)
        with pytest.raises(ProfileError, match="singular"):
            code.decode(code.encode(*page(3)), [3])


def build(**changes: Any) -> StoreProfile:
    arguments: dict[str, Any] = {
        "layers": {0: LayerProfile(side_of(HEADS, KEY), side_of(HEADS, VALUE))},
        "samples": {0: [Sample(*page(300, seed)) for seed in (1, 2)]},
        "queries": {0: queries()},
        "fingerprint": "f",
        "source": "s",
        "tokens": 600,
    }
    return build_profile(**(arguments | changes))


def test_coordinates_are_uncorrelated_and_sorted() -> None:
    for name, side in zip(("key", "value"), profile().layers[0], strict=True):
        x = torch.cat([getattr(Sample(*page(512, seed)), name) for seed in (1, 2)], 1)
        y = (x.transpose(0, 1).flatten(1) - side.mean) @ side.matrix.T
        covariance = y.T @ y / len(y)
        variance = covariance.diagonal()
        correlation = covariance / (variance[:, None] * variance).sqrt()
        assert (correlation - torch.eye(len(side.mean))).abs().max() < 0.05
        assert (variance[1:] <= 1.05 * variance[:-1]).all()
        torch.testing.assert_close(
            side.level[0], (6 * variance.log2()).round().short(), atol=1, rtol=0
        )
        # 0.8 is how much of a token is in the next one
        assert side.decay.float().median() == pytest.approx(0.8, abs=0.05)
        left = (1 - side.decay.float() ** 2).log2() * 6
        torch.testing.assert_close(side.level[1].float(), side.level[0] + left, atol=1.1, rtol=0)
        torch.testing.assert_close(
            side.inverse @ side.matrix, torch.eye(len(y.T)), atol=1e-3, rtol=0
        )


def test_building_is_the_same_again_and_reports() -> None:
    steps: list[str] = []
    assert build(report=steps.append).to_bytes() == build().to_bytes()
    assert steps == ["layer 0", "symbol frequencies"]


def test_frequencies_are_counted_and_rule_nothing_out() -> None:
    tables = profile().tables
    for counts in (tables.values, tables.cosets):
        assert counts.min() >= 1
        assert counts.sum(-1, dtype=np.int64).max() < 1 << 16
    assert (tables.values[:, 0, 0].argmax(-1) == 40).all()  # zeros, of the quietest
    spread = (tables.values[:, :, 0] > 100).sum(-1)
    assert (spread[:, -1] > 5 * spread[:, 0]).all()


def test_few_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    points = LayerCode.points

    def watch(self: LayerCode, keys: Tensor, *rest: Tensor) -> Any:
        seen.append(keys.shape[1])
        return points(self, keys, *rest)

    monkeypatch.setattr(LayerCode, "points", watch)
    build(samples={0: [Sample(*page(3000, 1)), Sample(*page(500, 2))]})
    assert set(seen) == {1024, 500}


def test_nothing_is_no_profile() -> None:
    with pytest.raises(ProfileError, match="nothing to profile"):
        build(layers={})
