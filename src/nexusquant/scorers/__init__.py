"""Token importance: one file per scorer, one registry.

To add a scorer: a new file with a `score(inputs)` method, one line in `SCORERS`, one test.
"""

from __future__ import annotations

from nexusquant.errors import ConfigError
from nexusquant.scorers.base import ScoreInputs, Scorer, ScoringRope, checked_scores
from nexusquant.scorers.expected_attention import ExpectedAttention
from nexusquant.scorers.key_key import KeyKey
from nexusquant.scorers.key_norm import KeyNorm
from nexusquant.scorers.kvzip import KVzip
from nexusquant.scorers.random import Random
from nexusquant.scorers.snapkv import SnapKV

__all__ = ["SCORERS", "ScoreInputs", "Scorer", "ScoringRope", "checked_scores", "get_scorer"]

SCORERS: dict[str, Scorer] = {
    "expected_attention": ExpectedAttention(),
    "snapkv": SnapKV(),
    "key_key": KeyKey(),
    "key_norm": KeyNorm(),
    "kvzip": KVzip(),
    "random": Random(),
}


def get_scorer(name: str) -> Scorer:
    """The scorer registered as `name`. Raises ConfigError, listing the known names."""
    try:
        return SCORERS[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(SCORERS))
        raise ConfigError(f"unknown scorer {name!r}; known scorers: {known}") from None
