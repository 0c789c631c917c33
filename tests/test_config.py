"""`CompressionConfig`: JSON round trip, every bad field named, presets by both names."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexusquant import PRESETS, CompressionConfig, ConfigError
from nexusquant.config import ALLOCATIONS, CODECS, LEVELS, MAX_BITS, TRANSFORMS, resolve_config
from nexusquant.errors import NexusQuantError
from nexusquant.math.e8 import BITS
from nexusquant.scorers import SCORERS

natural = st.integers(0, 10**6)
rate = st.floats(0, 8, exclude_min=True) | st.integers(1, 8)
tiers = st.lists(st.floats(0.001, 0.999), max_size=7).filter(lambda x: sum(x) < 1).map(tuple)
heads = st.just({"per_head": False}) | st.builds(
    dict, head_safeguard=st.floats(0, 1, exclude_min=True)
)
configs = st.builds(
    lambda heads, **others: CompressionConfig(**heads, **others),
    heads=heads,
    evict_ratio=st.floats(0, 1, exclude_max=True),
    scorer=st.sampled_from(sorted(SCORERS)),
    sinks=natural,
    recent=natural,
    codec=st.sampled_from(CODECS),
    key_bits=rate,
    value_bits=rate,
    allocation=st.sampled_from(ALLOCATIONS),
    tiers=tiers,
    tier_bits=st.none() | st.floats(0, 4) | st.integers(0, 4),
    transform=st.sampled_from(TRANSFORMS),
    rope_page=st.integers(0, 65_536),
    residual_length=st.integers(1, 10**6),
    fresh_length=natural,
    fresh_bits=st.floats(0, 8) | st.integers(0, 8),
    max_tokens=st.none() | st.integers(2 * 10**6 + 1, 10**9),
    levels=st.sampled_from(LEVELS),
    overload=st.floats(0.5, 4),
    seed=st.integers(0, 2**63 - 1),
)


@given(configs)
def test_json_round_trip(config: CompressionConfig) -> None:
    text = config.to_json()
    assert CompressionConfig.from_json(text) == config
    assert json.loads(text) == {**asdict(config), "tiers": list(config.tiers)}
    assert hash(config) == hash(CompressionConfig.from_json(text))


def test_json_may_leave_fields_out() -> None:
    assert CompressionConfig.from_json("{}") == CompressionConfig()
    assert CompressionConfig.from_json('{"sinks": 7}') == CompressionConfig(sinks=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON config"),
        ("{", "not a JSON config"),
        ("[1]", "JSON object, got list"),
        ("null", "JSON object, got NoneType"),
        ('{"colour": 1}', "unknown setting colour; known: allocation, codec"),
        ('{"tiers": [0.6, 0.4]}', r"tiers=\(0.6, 0.4\)"),
        ('{"tiers": 0.3}', "tiers=0.3"),
        ('{"sinks": -1}', "sinks=-1"),
        ('{"sinks": null}', "sinks=None"),
        ('{"evict_ratio": NaN}', "evict_ratio=nan"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_json(text)


NOT_INTEGERS: list[Any] = [1.5, 2.0, "4", None, True, [4]]
NOT_NUMBERS: list[Any] = ["0.5", None, True, False, math.nan, math.inf, -math.inf, [0.5], 1j]
NOT_NAMES: list[Any] = ["", "E8", None, 3, ["e8"], {}]
BAD: dict[str, list[Any]] = {
    "evict_ratio": [*NOT_NUMBERS, -0.01, 1.0, 1, 60],
    "scorer": [*NOT_NAMES, "attention"],
    "per_head": [0, 1, "yes", None],
    "head_safeguard": [*NOT_NUMBERS, 0, 0.0, -0.2, 1.01, 2],
    "sinks": [*NOT_INTEGERS, -1],
    "recent": [*NOT_INTEGERS, -1],
    "codec": [*NOT_NAMES, "fp8"],
    "key_bits": [*NOT_NUMBERS, 0, 0.0, -1, 8.01, 9],
    "value_bits": [*NOT_NUMBERS, 0, -0.5, 8.01, 16],
    "allocation": [*NOT_NAMES, "greedy"],
    "tiers": [
        *NOT_NAMES[:4],
        0.3,
        math.nan,
        {0.3},
        (0.0,),
        (1.0,),
        (1,),
        (-0.1,),
        (0.5, 0.5),
        (0.3, 0.8),
        (math.nan,),
        (math.inf,),
        ("0.1",),
        (None,),
        ((0.1,),),
        (0.1,) * 8,
    ],
    "tier_bits": [*filter(lambda x: x is not None, NOT_NUMBERS), -0.01, 4.01, 5],
    "transform": [*NOT_NAMES, "dct"],
    "rope_page": [*NOT_INTEGERS, -1, 65_537, 10**12],
    "residual_length": [*NOT_INTEGERS, 0, -1],
    "fresh_length": [*NOT_INTEGERS, -1],
    "fresh_bits": [*NOT_NUMBERS, -0.01, 8.01, 9],
    "max_tokens": [1.5, 200.0, "400", True, [4], 36, 0, -1, math.nan],
    "levels": [*NOT_NAMES, "lloyd"],
    "overload": [*NOT_NUMBERS, 0.49, 4.01, 0],
    "seed": [*NOT_INTEGERS, -1],
}


def test_every_field_is_checked() -> None:
    assert set(BAD) == {field.name for field in fields(CompressionConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str
)
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: must be ")
    with pytest.raises(ConfigError):
        CompressionConfig().replace(**{name: value})


@pytest.mark.parametrize("shares", [(0,), (1,), 0.2])
def test_what_tiers_are(shares: Any) -> None:
    with pytest.raises(ConfigError, match=r"a tuple of .* between 0 and 1 that add up to less"):
        CompressionConfig(tiers=shares)


def test_names_come_with_what_is_allowed() -> None:
    for name, allowed in (
        ("scorer", sorted(SCORERS)),
        ("codec", CODECS),
        ("transform", TRANSFORMS),
        ("levels", LEVELS),
        ("allocation", ALLOCATIONS),
    ):
        with pytest.raises(ConfigError, match="one of " + ", ".join(allowed)):
            CompressionConfig(**{name: "nonsense"})


def test_replace_makes_a_copy() -> None:
    config = CompressionConfig()
    changed = config.replace(sinks=9, key_bits=3.5)
    assert (changed.sinks, changed.key_bits, config.sinks) == (9, 3.5, 4)
    with pytest.raises(ConfigError, match=r"unknown setting depth, size; known: .*value_bits"):
        config.replace(size=1, depth=2, sinks=3)
    with pytest.raises(FrozenInstanceError):
        config.sinks = 3


def test_presets() -> None:
    assert list(PRESETS) == ["lossless", "high", "conservative", "balanced", "max", "aggressive"]
    assert PRESETS["high"] is PRESETS["conservative"]
    assert PRESETS["max"] is PRESETS["aggressive"]
    assert all(config.evict_ratio == 0 for config in PRESETS.values()), "nothing is dropped"
    bits = [PRESETS[name].key_bits for name in ("lossless", "high", "balanced", "max")]
    assert bits == sorted(set(bits), reverse=True)
    for name, config in PRESETS.items():
        assert resolve_config(name) is config
        assert (config.transform, config.allocation) == ("klt", "joint")


def test_the_highest_rate_is_the_highest_there_is_a_code_for() -> None:
    assert max(BITS) == MAX_BITS
    CompressionConfig(key_bits=MAX_BITS, value_bits=1e-3)


@given(tiers, st.floats(0, 4))
def test_tier_shares_and_factors(shares: tuple[float, ...], bits: float) -> None:
    config = CompressionConfig(tiers=shares, tier_bits=bits)
    assert config.tier_shares[:-1] == shares
    assert sum(config.tier_shares) == pytest.approx(1)
    assert min(config.tier_shares) > 0
    factors = config.tier_factors
    assert len(factors) == len(config.tier_shares)
    assert factors[-1] == 1
    for high, low in itertools.pairwise(factors):
        assert high / low == pytest.approx(4**bits)


def test_the_limit_leaves_room_for_sinks_and_recent_tokens() -> None:
    assert CompressionConfig(sinks=3, recent=5, max_tokens=9).max_tokens == 9
    with pytest.raises(ConfigError, match=r"max_tokens=8: must be None or .* at least 9 "):
        CompressionConfig(sinks=3, recent=5, max_tokens=8)


def test_heads_that_keep_the_same_tokens_have_no_budgets_to_share() -> None:
    assert CompressionConfig(head_safeguard=0.2).per_head
    assert CompressionConfig(per_head=False, head_safeguard=1).head_safeguard == 1
    with pytest.raises(ConfigError, match=r"head_safeguard=0.5: must be 1 with per_head=False"):
        CompressionConfig(per_head=False, head_safeguard=0.5)


def test_tiers_may_be_a_list_or_none_at_all() -> None:
    listed = CompressionConfig(tiers=[0.25, 0.5])
    assert listed == CompressionConfig(tiers=(0.25, 0.5))
    assert hash(listed) == hash(CompressionConfig(tiers=(0.25, 0.5)))
    assert listed.tier_factors == (16.0, 4.0, 1.0)
    alone = CompressionConfig(tiers=())
    assert (alone.tier_shares, alone.tier_factors) == ((1,), (1.0,))


def test_resolve_accepts_a_config_and_overrides() -> None:
    config = CompressionConfig(sinks=1)
    assert resolve_config(config) is config
    assert resolve_config(config, recent=5) == CompressionConfig(sinks=1, recent=5)
    assert resolve_config("max", evict_ratio=0.9).evict_ratio == 0.9
    assert PRESETS["max"].evict_ratio != 0.9


@pytest.mark.parametrize("quality", ["best", "", None, 3, ["max"], {"sinks": 3}], ids=str)
def test_unknown_presets_list_the_known_ones(quality: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(quality)
    message = str(caught.value)
    assert repr(quality) in message
    assert all(name in message for name in PRESETS)


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="sinks"):
        CompressionConfig(sinks=-1)
    with pytest.raises(NexusQuantError):
        resolve_config("max", sinks=-1)
