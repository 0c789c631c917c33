"""KVzip (Kim et al. 2025, arXiv 2505.23416): what the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs, causal_attention
from nexusquant.scorers.expected_attention import ExpectedAttention

_BLOCK = 64  # queries whose weights exist at once


@dataclass(frozen=True)
class KVzip:
    """Largest attention weight that each candidate receives while the model reads the prompt again.

    Reading it again behind itself, the model looks at what it needs to predict it: the importance
    of a token for *any* later question, not for those at the end of the prompt. Costs a second
    forward pass over the prompt. It goes by pieces of up to 1,024 tokens, each right behind the
    prompt, and never past the model's positions (`max_position_embeddings`): near their end the
    pieces are shorter, and with fewer than 32 left there is none. Without such a pass (also in
    assisted decoding, for embeddings instead of token ids, for bare tensors) expected attention
    decides.
    """

    second_pass: ClassVar[bool] = True
    otherwise: ExpectedAttention = field(default_factory=ExpectedAttention)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32."""
        return self.otherwise.score(inputs) if inputs.received is None else inputs.received


def most_attention(
    queries: Tensor,
    keys: Tensor,
    candidates: int,
    valid: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Largest weight per candidate over queries and the GQA group, (batch, kv_heads, candidates).

    Args:
        queries: (batch, query_heads, q_len, dim) post-RoPE, of the last q_len keys.
        keys: (batch, kv_heads, n, dim) post-RoPE: the candidates, then their repetition.
        valid: (batch, n) bool; None if all are real.
    """
    best = torch.zeros(*keys.shape[:2], candidates, device=keys.device)
    first = keys.shape[2] - queries.shape[2]
    for block in torch.split(queries, _BLOCK, dim=2):
        weight = causal_attention(block, keys, valid, first=first, scaling=scaling, softcap=softcap)
        best = torch.maximum(best, weight[..., :candidates].amax((2, 3)))
        first += block.shape[2]
    return best
