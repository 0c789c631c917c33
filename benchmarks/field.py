"""Who competes, with which settings."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ablation import ablation
from benchmarks.calibrated import Profiles
from benchmarks.competitors import (
    Competitor,
    EvictionOnly,
    LloydMax,
    Nexus,
    TransformersQuantized,
)
from benchmarks.original import PRESETS as ORIGINAL_PRESETS
from benchmarks.original import Original, Package
from benchmarks.stored import storage
from nexusquant import PRESETS, CompressionConfig

BITS = (1.25, 1.5, 2, 2.5, 3, 4)
EVICTING = ((0.5, 1.25), (0.5, 2.5), (0.8, 1.25))
HADAMARD_BITS = (1.5, 2, 2.5, 3, 4)
EVICTIONS = (
    ("expected_attention", 0.2),
    ("expected_attention", 0.5),
    ("expected_attention", 0.7),
    ("snapkv", 0.5),
    ("key_key", 0.5),
    ("key_norm", 0.5),
    ("random", 0.5),
)
# quanto groups along axis 0 or -1, HQQ along 1 or 0: each the library's per-token groups (the
# documented choice) first, then per-channel groups for keys, as KIVI has them.
QUANTIZED = {"quanto": ((0, 0), (-1, 0)), "hqq": ((1, 1), (0, 1))}


# Points of the frontier, at about the same sizes whatever is evicted.
FRONTIER = {
    0.0: (0.4, 0.8, 1.25, 1.75, 2.15),
    0.2: (0.5, 1.0, 1.4, 1.78),
    0.4: (0.6, 0.9, 1.37, 2.0),
    0.6: (1.0, 1.5, 2.2),
}


def presets(profiles: Profiles, original: Package | None = None) -> list[Competitor]:
    """Our presets alone."""
    return [
        Nexus("ours, presets", name, PRESETS[name], profiles.get)
        for name in ("lossless", "high", "balanced", "max")
    ]


def frontier(profiles: Profiles, original: Package | None = None) -> list[Competitor]:
    """Our presets, and what else the same bytes could buy: eviction against bits."""
    return presets(profiles) + [
        Nexus(f"ours, {evict:.0%} evicted", f"{bits} bits", coded(bits, evict), profiles.get)
        for evict, rates in FRONTIER.items()
        for bits in rates
    ]


def coded(bits: float, evict: float = 0.0) -> CompressionConfig:
    """Defaults at so many bits."""
    return CompressionConfig(key_bits=bits, value_bits=bits, evict_ratio=evict)


def competitors(profiles: Profiles, original: Package | None) -> list[Competitor]:
    """All of them, ours first."""
    field = presets(profiles)
    field += [Nexus("ours, no eviction", f"{b} bits", coded(b), profiles.get) for b in BITS]
    field += [
        Nexus("ours, evicting", f"{b} bits, {evict:.0%} evicted", coded(b, evict), profiles.get)
        for evict, b in EVICTING
    ]
    field += [Nexus("ours, Hadamard", f"{b} bits", hadamard(b)) for b in HADAMARD_BITS]
    field += [
        EvictionOnly(
            "eviction only" if scorer == "expected_attention" else "eviction only, other scorers",
            f"{scorer} {evict:.0%}",
            CompressionConfig(codec="exact", scorer=scorer, evict_ratio=evict),
        )
        for scorer, evict in EVICTIONS
    ]
    field += [LloydMax(bits) for bits in (2, 3, 4)]
    field += [
        TransformersQuantized(backend, bits, *axes)
        for backend, pairs in QUANTIZED.items()
        for axes in pairs
        for bits in (2, 4)
    ]
    field += [Original(original, preset) for preset in ORIGINAL_PRESETS]
    field.append(Original(original, "balanced", masked=False))
    return field


def hadamard(bits: float) -> CompressionConfig:
    """The original system's pipeline in our code: no profile, no tiers, RoPE removed, same bits."""
    return CompressionConfig(
        key_bits=bits, value_bits=bits, transform="hadamard", tiers=(), allocation="uniform",
        rope_page=1,
    )  # fmt: skip


FIELDS: dict[str, Callable[[Profiles, Package | None], list[Competitor]]] = {
    "competitors": competitors,
    "presets": presets,
    "frontier": frontier,
    "ablation": ablation,
    "storage": lambda profiles, original: storage(profiles.get, profiles.store),
}
