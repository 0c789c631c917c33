"""What a scorer sees and must return, and the causal attention that two of them share.

A scorer knows importance only. How many tokens are kept, and which are kept whatever their score
(sinks, recent window), is the business of `nexusquant.budget`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nexusquant.errors import ConfigError, NonFiniteError


class ScoringRope(Protocol):
    """The rotary embedding of one layer, for the queries of one call."""

    def remove(self, queries: Tensor, step: int = 1) -> Tensor:
        """Post-RoPE `(batch, query_heads, n, head_dim)` to position-free, fp32.

        They are every `step`-th query of the call, up to the last one.
        """

    def average_rotation(self, count: int) -> Tensor | None:
        """`(batch, head_dim, head_dim)` fp32 matrix M; M q is the mean of R(p) q over the next
        `count` positions. None if future positions are unknown.
        """


@dataclass(frozen=True)
class ScoreInputs:
    """One layer's candidates for eviction and the queries that have seen them.

    queries: `(batch, query_heads, q_len, head_dim)` post-RoPE. They belong to the last `q_len`
        candidates: query i sits at candidate index `tokens - q_len + i` and sees no later one.
    keys: `(batch, kv_heads, tokens, head_dim)` post-RoPE. `query_heads` is a multiple of
        `kv_heads`; query head h reads KV head `h // (query_heads // kv_heads)`.
    values: `(batch, kv_heads, tokens, value_dim)`.
    valid: `(batch, tokens)` bool, False where a candidate is padding; None if there is none.
    scaling, softcap: the model's attention logits are `softcap * tanh(scaling q.k / softcap)`.
    sinks: how many leading valid candidates are attention sinks.
    received: `(batch, kv_heads, tokens)` fp32 from a second pass over the prompt, for scorers that
        ask for one (`second_pass = True`); None if there was none.
    seed, layer_idx: for scorers that draw random numbers.

    Raises ConfigError if the shapes do not fit together.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: int = 4
    rope: ScoringRope | None = None
    seed: int = 0
    layer_idx: int = 0
    received: Tensor | None = None

    def __post_init__(self) -> None:
        q, k, v = self.queries.shape, self.keys.shape, self.values.shape
        fits = (
            len(q) == len(k) == len(v) == 4
            and q[0] == k[0]
            and q[1] % k[1] == 0
            and q[2] <= k[2]
            and q[3] == k[3]
            and v[:3] == k[:3]
        )
        if not fits:
            raise ConfigError(
                f"queries {tuple(q)}, keys {tuple(k)} and values {tuple(v)} must be (batch, heads, "
                "tokens, dim) with query heads a multiple of KV heads and no more queries than keys"
            )
        if self.valid is not None and (
            self.valid.shape != (k[0], k[2]) or self.valid.dtype != torch.bool
        ):
            raise ConfigError(
                f"valid must be bool {(k[0], k[2])}, got {self.valid.dtype} "
                f"{tuple(self.valid.shape)}"
            )

    def valid_mask(self) -> Tensor:
        """`valid` as a `(batch, tokens)` bool tensor, all True where there is no padding."""
        if self.valid is not None:
            return self.valid
        batch, _, tokens, _ = self.keys.shape
        return torch.ones(batch, tokens, dtype=torch.bool, device=self.keys.device)


class Scorer(Protocol):
    """Anything that ranks the candidates of one layer."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32, higher is kept; meaningless where not valid."""


def checked_scores(scores: object, inputs: ScoreInputs, name: str) -> Tensor:
    """What the scorer `name` returned for `inputs`, in fp32 where the keys are.

    Raises ConfigError for anything but a real tensor of `Scorer.score`'s shape, NonFiniteError if a
    valid token's score is NaN or infinite.
    """
    shape = tuple(inputs.keys.shape[:3])
    given = type(scores).__name__
    if isinstance(scores, Tensor):
        given = f"{scores.dtype} {tuple(scores.shape)}"
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.shape != shape:
        raise ConfigError(f"scorer {name!r} must return a tensor of {shape}, got {given}")
    scores = scores.to(inputs.keys.device, torch.float32)
    bad = int((~torch.isfinite(scores) & inputs.valid_mask()[:, None]).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {scores.numel()} importance scores are NaN or infinite: look for such keys,"
            f" values and queries first, then at scorer {name!r}"
        )
    return scores


def causal_attention(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    *,
    first: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention weights of a block of queries, in fp32.

    `queries` `(batch, query_heads, q, head_dim)` sit at the indices `first .. first + q - 1` of
    `keys` `(batch, kv_heads, n, head_dim)`; `valid` is `(batch, n)` bool or None. Returns
    `(batch, kv_heads, group, q, n)`. Padding gets no attention and padded queries give none: their
    rows are zero, whatever (NaN included) their vectors hold.
    """
    batch, query_heads, q_len, dim = queries.shape
    _, kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    # The scale goes onto the queries, the smaller operand, rather than onto the logits.
    folded = (queries.float() * scaling).reshape(batch, kv_heads, group * q_len, dim)
    logits = folded @ keys.float().mT
    logits = logits.view(batch, kv_heads, group, q_len, tokens)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    index = torch.arange(first, tokens, device=keys.device)
    # A finite floor: a row that sees nothing becomes uniform (and is zeroed below), not NaN.
    floor = torch.finfo(torch.float32).min
    logits[..., first:].masked_fill_(index > index[:q_len, None], floor)
    if valid is not None:
        logits.masked_fill_(~valid[:, None, None, None, :], floor)
    weights = logits.softmax(-1)
    if valid is not None:
        weights.masked_fill_(~valid[:, None, None, first : first + q_len, None], 0.0)
    return weights
