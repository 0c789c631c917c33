"""What every stage is worth: the same bytes spent without it, or with another choice there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.calibrated import PAGE, Change, Profiles
from benchmarks.competitors import Competitor, Nexus, Prefilled, Prompt
from nexusquant import PRESETS, CompressionConfig, NexusCache
from nexusquant.kernels import use_operator
from nexusquant.profile import Profile
from nexusquant.residual import OutputSide
from nexusquant.sampling import CALIBRATION
from nexusquant.tokens import CodedTokens

_TOLERANCE = 0.004  # of the bits
_GAIN_OF_ONE = 6


@dataclass(frozen=True)
class Stage:
    """One row: what differs from the first one.

    Attributes:
        settings: of the config.
        page: key frame, which needs a profile of its own.
        statistics: in force while the profile is built.
        coding: in force while the prompt is compressed.
        spared: bits per element of the cache that the change would not store.
    """

    stage: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    page: int = PAGE
    statistics: Change = nullcontext
    coding: Change = nullcontext
    spared: Callable[[NexusCache], float] = lambda cache: 0.0


@dataclass
class Target:
    """The size that all rows of one table have: that of its first, by prompt length."""

    bits: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EqualBytes(Nexus):
    """Our pipeline, its bits set so that the cache takes as many bytes as the target."""

    target: Target = field(default_factory=Target)
    stage: Stage = field(default_factory=lambda: Stage("", ""))

    def prefill(self, prompt: Prompt) -> Prefilled:
        config = self.config
        for _ in range(5):
            with self.stage.coding():
                cache = self._run(prompt, config)
            bits = cache.bits_per_element - self.stage.spared(cache)
            wanted = self.target.bits.setdefault(prompt.tokens, bits)
            if abs(bits - wanted) <= _TOLERANCE * wanted:
                break
            more = (wanted - bits) / (1 - config.evict_ratio)
            config = config.replace(
                key_bits=max(config.key_bits + more, 0.05),
                value_bits=max(config.value_bits + more, 0.05),
            )
        return Prefilled(cache, bits, "counted" if self.stage.spared(cache) else "measured")


def ablation(profiles: Profiles, original: Any = None) -> list[Competitor]:
    """Coding at the size of 1.4 bits without eviction; eviction at the size of `balanced`."""
    tables = (
        ("coding", CompressionConfig(key_bits=1.4, value_bits=1.4), CODING),
        ("eviction", PRESETS["balanced"], EVICTION),
    )
    return [
        EqualBytes(
            f"{table}, {one.stage}", one.name, base.replace(rope_page=one.page, **one.settings),
            _fresh(partial(profiles.get, one.page, one.statistics)), target, one,
        )
        for table, base, stages in tables
        for target in [Target()]
        for one in stages
    ]  # fmt: skip


def _fresh(get: Callable[[], Profile]) -> Callable[[], Profile]:
    """The same profile without remembered layouts, which the change may affect."""
    return cache(lambda: replace(get(), _layouts={}))


# -- what can be changed


@contextmanager
def unit_metrics() -> Iterator[None]:
    """Noise matters alike in all directions: plain principal components."""

    def metric(sample: Any, *_: Any) -> Tensor:
        heads, _, dim = sample.keys.shape
        return torch.eye(dim, device=sample.keys.device).expand(heads, dim, dim)

    with patch("nexusquant.statistics._key_metric", metric), unknown_output():
        yield


@contextmanager
def unknown_output() -> Iterator[None]:
    """Neither the output projection nor the residual stream is known."""
    with patch("nexusquant.hf.attention.output_side", lambda *_: OutputSide()):
        yield


@contextmanager
def uniform_queries() -> Iterator[None]:
    """All pairs of query and key count the same in the keys' metric."""
    with patch("nexusquant.hf.collecting.CALIBRATION", replace(CALIBRATION, influence=0.0)):
        yield


@contextmanager
def incoherent() -> Iterator[None]:
    """Groups without bits are thought of as independent noise in every token."""

    def ones(moments: Any, transform: Tensor, variance: Tensor) -> Tensor:
        return torch.ones_like(variance)

    with patch("nexusquant.moments.Moments._coherence", ones):
        yield


@contextmanager
def unweighted_values() -> Iterator[None]:
    """The measured factor between the two sides left out."""
    with patch("nexusquant.profile.VALUE_SHARE", 1.0):
        yield


@contextmanager
def no_gains() -> Iterator[None]:
    """Every vector is coded at the sequence's scale."""

    def one(y: Tensor, *_: Any) -> Tensor:
        return y.new_full(y.shape[:-1], _GAIN_OF_ONE, dtype=torch.uint8)

    with patch("nexusquant.kernels.reference._gains", one), _reference():
        yield


@contextmanager
def gains_of_size() -> Iterator[None]:
    """The gain is the vector's size, whatever that clips."""
    with patch("nexusquant.kernels.reference._STEPS", 0), _reference():
        yield


@contextmanager
def _reference() -> Iterator[None]:
    """The operator that can be patched."""
    before = use_operator("reference")
    try:
        yield
    finally:
        use_operator(before)


@contextmanager
def tokens_alike() -> Iterator[None]:
    """All tokens count the same in the covariances."""
    with patch("nexusquant.hf.collecting.CALIBRATION", replace(CALIBRATION, attended=0.0)):
        yield


def gains_of(cache: NexusCache) -> float:
    """Bits per element that the gains take."""
    parts = [part for layer in cache.layers for part in layer.stored.body]
    taken = sum(part.gains.nbytes for part in parts if isinstance(part, CodedTokens))
    return taken / cache.nbytes * cache.bits_per_element


def apart(keys: float, values: float) -> dict[str, Any]:
    """Settings with a budget for each side."""
    return {"allocation": "split", "key_bits": keys, "value_bits": values}


CODING = (
    Stage("all", "as shipped"),
    Stage("transform", "Hadamard, channel scales", {"transform": "hadamard"}),
    Stage("transform", "none, channel scales", {"transform": "identity"}),
    Stage("transform", "KLT, no metrics", statistics=unit_metrics),
    Stage("metric", "all queries alike", statistics=uniform_queries),
    Stage("metric", "output unknown", statistics=unknown_output),
    Stage("covariance", "all tokens alike", statistics=tokens_alike),
    Stage("frame", "RoPE removed (page 1)", page=1),
    Stage("frame", "page 8", page=8),
    Stage("frame", "page 128", page=128),
    Stage("frame", "post-RoPE (page 0)", page=0),
    Stage("allocation", "all error is noise", statistics=incoherent),
    Stage("allocation", "keys and values apart", apart(1.4, 1.4)),
    Stage("allocation", "all groups alike", {"allocation": "uniform"}),
    Stage("K/V split", "no factor on values", coding=unweighted_values),
    Stage("K/V split", "keys 0.5 more", apart(1.65, 1.15)),
    Stage("K/V split", "values 0.5 more", apart(1.15, 1.65)),
    Stage("tiers", "none", {"tiers": ()}),
    Stage("tiers", "two", {"tiers": (0.2,)}),
    Stage("tiers", "half a bit apart", {"tier_bits": 0.5}),
    Stage("tiers", "1.5 bits apart", {"tier_bits": 1.5}),
    Stage("gains", "none", coding=no_gains, spared=gains_of),
    Stage("gains", "by size alone", coding=gains_of_size),
    Stage("levels", "uniform", {"levels": "uniform"}),
    Stage("levels", "range x 0.8", {"overload": 0.8}),
    Stage("levels", "range x 1.25", {"overload": 1.25}),
)  # fmt: skip

EVICTION = (
    Stage("all", "as shipped"),
    *(
        Stage("scorer", name, {"scorer": name})
        for name in ("kvzip", "snapkv", "key_norm", "key_key", "random")
    ),
    Stage("heads", "same tokens in all", {"per_head": False}),
    *(
        Stage("heads", f"shared budget, {share:.0%} safe", {"head_safeguard": share})
        for share in (0.8, 0.5, 0.2)
    ),
    Stage("tiers", "none", {"tiers": ()}),
    *(Stage("evicted", f"{share:.0%}", {"evict_ratio": share}) for share in (0.0, 0.2, 0.6)),
)
