"""`CompressionConfig`: every choice of the pipeline in one frozen value, and the presets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nexusquant.errors import ConfigError
from nexusquant.rank_costs import SCORER

CODECS = ("e8", "exact")
TRANSFORMS = ("klt", "hadamard", "identity")
ALLOCATIONS = ("joint", "split", "uniform")
LEVELS = ("companded", "uniform")
MAX_BITS = 8
MAX_PAGE = 65_536


@dataclass(frozen=True)
class CompressionConfig:
    """How one cache is compressed. Immutable, validated, JSON round trip.

    Args:
        evict_ratio: fraction of the tokens dropped from each compressed chunk, in [0, 1), as far as
            `recent` allows.
        scorer: importance score that decides which tokens are dropped, by name: one of
            `nexusquant.scorers` or of your own (`register_scorer`).
        per_head: every KV head keeps its own tokens; False keeps the same tokens in all heads.
        head_safeguard: share of its even budget that each KV head is certain of, in (0, 1]; the
            rest of a layer's budget goes to the heads whose tokens score highest (AdaKV, Feng et
            al. 2024, arXiv 2407.11550). 1 gives all heads the same number. Needs `per_head`.
        sinks: first tokens of a sequence, always kept and stored uncoded.
        recent: last tokens of every chunk, never dropped (but coded), as nothing is reconsidered
            when more follows: a chunk of n tokens keeps max(round((1 - evict_ratio) n), recent) of
            them (the first one sinks + recent), so a prompt that comes in chunks of little more
            than `recent` loses next to nothing.
        codec: "e8" (lattice codes) or "exact" (kept tokens stored as they are).
        key_bits, value_bits: mean bits per element of the kept tokens, above 0, at most 8.
        allocation: who gets them. "joint": keys and values of all heads and layers draw on one
            budget, by what noise there does to the attention output; "split": keys and values
            apart, also where `key_bits` and `value_bits` differ; "uniform": all groups alike, also
            what happens without a profile.
        tiers: shares of the kept tokens that get more bits than the rest, most important first;
            () treats all tokens alike.
        tier_bits: bits per element that a tier gets more than the next one. None: by what a
            profile says of every head's tokens of such ranks; 1 where it does not.
        transform: coordinates to code in. "klt": the query-weighted Karhunen-Loeve transform of the
            model's profile, Hadamard as long as there is no profile; "hadamard"; "identity".
        rope_page: keys are un-rotated to the start of their page of this many positions:
            1 removes RoPE altogether, 0 leaves it on.
        residual_length: the uncoded tail is compressed when it reaches this many tokens. Only
            forward passes over at least as many tokens, and as many as `recent`, evict, each from a
            chunk of its own (what was left in the tail included); decoded tokens are only coded.
            Once something is compressed, the tail of an fp32 model is kept in 16 bits.
        fresh_length: decoded tokens are fresh, and coded with more bits, until there are more than
            so many of them; then the older ones, all but half as many, are coded once more, like
            the others. With `max_tokens`, no more than a quarter of those are fresh. 0 for none.
        fresh_bits: bits per element that a fresh token gets beyond `key_bits` and `value_bits`.
        max_tokens: most tokens stored per head and full-attention layer, uncoded tail not counted.
            When a block makes it more, those that the latest queries attend to least are dropped,
            so a generation of any length takes bounded memory, but for the 4 bytes of every
            token's position that RoPE is undone with. From shortly before the limit on, the latest
            32 queries of every layer are kept, too, in 16 bits: as much as some hundred tokens
            take, so that small limits do not pay. The last `recent` all stay: behind
            a prompt, where heads have them in different tiers, that may take some tokens more
            than a limit near `sinks + recent`. None for no limit.
        levels: reconstruction levels of the lattice code, "companded" or "uniform".
        overload: factor on the code's range; above 1 trades granular noise for fewer clipped
            outliers. 1 is where the KL was lowest.
        seed: seed of the random scorer.

    Raises:
        ConfigError: a field out of range; the message names the field and what is allowed.

    Example:
        >>> from nexusquant import CompressionConfig
        >>> config = CompressionConfig(evict_ratio=0.5, key_bits=3)
        >>> CompressionConfig.from_json(config.to_json()) == config
        True
    """

    evict_ratio: float = 0.0
    scorer: str = SCORER
    per_head: bool = True
    head_safeguard: float = 1.0
    sinks: int = 4
    recent: int = 32
    codec: str = "e8"
    key_bits: float = 2
    value_bits: float = 2
    allocation: str = "joint"
    tiers: tuple[float, ...] = (0.03, 0.1, 0.2, 0.3)
    tier_bits: float | None = None
    transform: str = "klt"
    rope_page: int = 32
    residual_length: int = 8
    fresh_length: int = 128
    fresh_bits: float = 3.0
    max_tokens: int | None = None
    levels: str = "companded"
    overload: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        from nexusquant.scorers import SCORERS

        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be {allowed}.")

        def number(name: str, kinds: tuple[type, ...] = (int,)) -> bool:
            value = getattr(self, name)
            return isinstance(value, kinds) and not isinstance(value, bool)

        real = (int, float)
        if isinstance(self.tiers, list):  # JSON has no tuples
            object.__setattr__(self, "tiers", tuple(self.tiers))
        need(number("evict_ratio", real) and 0 <= self.evict_ratio < 1, "evict_ratio", "in [0, 1)")
        need(
            isinstance(self.scorer, str) and self.scorer in SCORERS,
            "scorer",
            "one of " + ", ".join(sorted(SCORERS)) + " (register_scorer adds others)",
        )
        need(isinstance(self.per_head, bool), "per_head", "True or False")
        safe = number("head_safeguard", real) and 0 < self.head_safeguard <= 1
        need(safe, "head_safeguard", "in (0, 1]")
        need(
            self.per_head or self.head_safeguard == 1, "head_safeguard",
            "1 with per_head=False, where all heads keep the same tokens",
        )  # fmt: skip
        need(self.codec in CODECS, "codec", "one of " + ", ".join(CODECS))
        need(self.transform in TRANSFORMS, "transform", "one of " + ", ".join(TRANSFORMS))
        need(self.levels in LEVELS, "levels", "one of " + ", ".join(LEVELS))
        need(self.allocation in ALLOCATIONS, "allocation", "one of " + ", ".join(ALLOCATIONS))
        for name in ("key_bits", "value_bits"):
            ok = number(name, real) and 0 < getattr(self, name) <= MAX_BITS
            need(ok, name, f"a number above 0, at most {MAX_BITS}")
        shares = isinstance(self.tiers, tuple) and all(
            isinstance(x, float) and 0 < x < 1 for x in self.tiers
        )
        need(
            shares and len(self.tiers) < 8 and sum(self.tiers) < 1, "tiers",
            "a tuple of at most 7 fractions between 0 and 1 that add up to less than 1",
        )  # fmt: skip
        apart = self.tier_bits
        ok = apart is None or (number("tier_bits", real) and 0 <= apart <= 4)
        need(ok, "tier_bits", "None, or from 0 to 4")
        for name in ("sinks", "recent", "seed"):
            need(number(name) and getattr(self, name) >= 0, name, "an integer of at least 0")
        page = f"an integer from 0 to {MAX_PAGE:,}"
        need(number("rope_page") and 0 <= self.rope_page <= MAX_PAGE, "rope_page", page)
        need(
            number("residual_length") and self.residual_length >= 1, "residual_length", "at least 1"
        )
        fresh = number("fresh_length") and self.fresh_length >= 0
        need(fresh, "fresh_length", "an integer of at least 0")
        need(number("fresh_bits", real) and 0 <= self.fresh_bits <= 8, "fresh_bits", "from 0 to 8")
        least = self.sinks + self.recent + 1
        need(
            self.max_tokens is None or (number("max_tokens") and self.max_tokens >= least),
            "max_tokens", f"None or an integer of at least {least} (sinks + recent + 1)",
        )  # fmt: skip
        need(number("overload", real) and 0.5 <= self.overload <= 4, "overload", "from 0.5 to 4")

    @property
    def tier_shares(self) -> tuple[float, ...]:
        """Fraction of the kept tokens in every tier, adding up to 1."""
        return (*self.tiers, 1 - sum(self.tiers))

    @property
    def tier_factors(self) -> tuple[float, ...]:
        """What noise costs in every tier relative to the last, where that is not known by rank: one
        bit is a factor of 4.
        """
        last, apart = len(self.tiers), 1.0 if self.tier_bits is None else self.tier_bits
        return tuple(4.0 ** (apart * (last - i)) for i in range(last + 1))

    @property
    def ranked(self) -> bool:
        """Whether tiers are by the ranks that a profile knows costs of."""
        return self.scorer == SCORER and self.per_head and self.tier_bits is None

    @property
    def least_scored(self) -> int:
        """Tokens of a forward pass that is scored: the last `recent` of any would all be kept."""
        return max(self.residual_length, self.recent, 2)

    @property
    def most_fresh(self) -> int:
        """Tokens that are fresh at most, 0 for none."""
        if self.max_tokens is None or not self.fresh_bits:
            return self.fresh_length if self.fresh_bits else 0
        return min(self.fresh_length, (self.max_tokens - self.sinks) // 4)

    def to_json(self) -> str:
        """The config as a JSON object, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """Inverse of `to_json`. Raises `ConfigError` on bad JSON or unknown fields."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON config: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"a config is a JSON object, got {type(data).__name__}.")
        return cls().replace(**data)

    def replace(self, **overrides: Any) -> CompressionConfig:
        """A copy with some fields changed. Raises `ConfigError` on names that do not exist."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(overrides) - known):
            raise ConfigError(
                f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}."
            )
        return replace(self, **overrides)


_HIGH = CompressionConfig(key_bits=1.15, value_bits=1.15)
_MAX = CompressionConfig(key_bits=0.33, value_bits=0.33, fresh_bits=2.5)

PRESETS: dict[str, CompressionConfig] = {
    "lossless": CompressionConfig(key_bits=1.8, value_bits=1.8),
    "high": _HIGH,
    "conservative": _HIGH,
    "balanced": CompressionConfig(key_bits=0.68, value_bits=0.68),
    "max": _MAX,
    "aggressive": _MAX,
}
"""Preset name to config; `conservative` is `high`, `aggressive` is `max`."""


def resolve_config(quality: str | CompressionConfig, **overrides: Any) -> CompressionConfig:
    """The config of a preset name (or a config itself), with fields overridden.

    Raises:
        ConfigError: unknown preset (the message lists the known ones) or unknown field.
    """
    if isinstance(quality, CompressionConfig):
        config = quality
    elif isinstance(quality, str) and quality in PRESETS:
        config = PRESETS[quality]
    else:
        raise ConfigError(
            f"unknown quality {quality!r}; known presets: {', '.join(PRESETS)}"
            " (or pass a CompressionConfig)."
        )
    return config.replace(**overrides) if overrides else config
