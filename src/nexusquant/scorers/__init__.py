"""Token importance: one file per scorer, one registry.

To add a scorer: a new file with a `score(inputs)` method, one line in `SCORERS`, one test. Code
outside of this package calls `register_scorer` instead.
"""

from __future__ import annotations

from nexusquant.errors import ConfigError
from nexusquant.scorers.base import ScoreInputs, Scorer, ScoringRope, checked_scores
from nexusquant.scorers.expected_and_observed import ExpectedAndObserved
from nexusquant.scorers.expected_attention import ExpectedAttention
from nexusquant.scorers.key_key import KeyKey
from nexusquant.scorers.key_norm import KeyNorm
from nexusquant.scorers.kvzip import KVzip
from nexusquant.scorers.random import Random
from nexusquant.scorers.snapkv import SnapKV

__all__ = [
    "SCORERS", "ScoreInputs", "Scorer", "ScoringRope", "checked_scores", "get_scorer",
    "register_scorer",
]  # fmt: skip

SCORERS: dict[str, Scorer] = {
    "expected_and_observed": ExpectedAndObserved(),
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


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make a scorer available as `scorer=name` to every config of this process.

    Args:
        scorer: an object whose `score` takes `ScoreInputs` and returns `(batch, kv_heads, tokens)`,
            higher is kept. If it has `second_pass = True`, the prompt is read a second time, and
            `ScoreInputs.received` is the attention that its tokens got.

    Raises:
        ConfigError: no name, one that is taken, or nothing that can score.

    Example:
        >>> from nexusquant import NexusCache, register_scorer
        >>> class ValueNorm:
        ...     def score(self, inputs):
        ...         return inputs.values.float().norm(dim=-1)
        >>> register_scorer("value_norm", ValueNorm())
        >>> NexusCache(model, quality="high", scorer="value_norm").config.scorer
        'value_norm'
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{name!r} is no name for a scorer: give a string that is not empty.")
    if isinstance(scorer, type) or not callable(getattr(scorer, "score", None)):
        raise ConfigError(
            f"scorer {name!r} must be an object with a method score(inputs), got {scorer!r}."
        )
    if SCORERS.setdefault(name, scorer) is not scorer:
        raise ConfigError(f"there is a scorer {name!r} already: register this one by another name.")
