"""The ablation in benchmarks/: rows of equal bytes, and changes that change something."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import CODING, EVICTION, EqualBytes, Stage, Target, gains_of
from benchmarks.calibrated import Profiles
from benchmarks.competitors import Prompt
from nexusquant import CompressionConfig
from nexusquant.math.gains import decode_gain
from tests.bench_cases import DIM


def row(stage: Stage, target: Target, profiles: Profiles) -> EqualBytes:
    config = CompressionConfig(key_bits=1.4, value_bits=1.4).replace(**stage.settings)
    return EqualBytes("coding", stage.name, config, profiles.get, target, stage)


@pytest.mark.parametrize("settings", [{"tiers": ()}, {"transform": "hadamard"}, {"rope_page": 0}])
def test_rows_take_the_same_bytes(
    settings: dict[str, object], prompt: Prompt, profiles: Profiles
) -> None:
    page = settings.get("rope_page", 32)
    assert isinstance(page, int)
    target = Target()
    first = row(Stage("all", "as shipped"), target, profiles).prefill(prompt)
    config = CompressionConfig(key_bits=3, value_bits=1).replace(**settings)
    other = EqualBytes("coding", "other", config, lambda: profiles.get(page), target)
    found = other.prefill(prompt)
    assert found.how == "measured"
    assert found.bits == pytest.approx(first.bits, rel=0.02)  # 128 tokens: rows are few bytes
    assert found.cache.bits_per_element == found.bits


def test_without_gains_all_have_one_size_and_are_not_charged(
    prompt: Prompt, profiles: Profiles
) -> None:
    (stage,) = (one for one in CODING if one.name == "none" and one.stage == "gains")
    found = row(stage, Target(), profiles).prefill(prompt)
    codes = {
        code
        for layer in found.cache.layers
        for part in layer.stored.body
        for code in part.gains.unique().tolist()
    }
    assert codes == {6 | 6 << 4}
    assert decode_gain(torch.tensor([6])).item() == 1
    assert found.how == "counted"
    assert found.cache.bits_per_element - found.bits == pytest.approx(gains_of(found.cache))
    assert gains_of(found.cache) == pytest.approx(8 / (2 * DIM), rel=0.05)


@pytest.mark.parametrize("stage", [one for one in CODING if one.statistics is not nullcontext])
def test_changed_statistics_change_the_profile(stage: Stage, profiles: Profiles) -> None:
    usual, changed = (one.layers[0] for one in (profiles.get(), profiles.get(32, stage.statistics)))
    assert not all(
        torch.equal(getattr(getattr(usual, side), name), getattr(getattr(changed, side), name))
        for side in ("key", "value")
        for name in ("forward", "coherence")
    )
    assert profiles.get() is profiles.get()
    assert profiles.nbytes == profiles.get().nbytes


def test_every_stage_is_a_setting_that_exists() -> None:
    for one in (*CODING, *EVICTION):
        CompressionConfig().replace(**one.settings)
    assert ablation.CODING[0].settings == {}
