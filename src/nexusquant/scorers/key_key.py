"""Key-key attention: the scorer of the system that NexusQuant re-creates, kept as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant.scorers.base import ScoreInputs, causal_attention


@dataclass(frozen=True)
class KeyKey:
    """How much later keys look at this key, each key standing in for its own query.

    Causal softmax of the scaled key-key products; a token's score is the mean weight that it gets
    from the valid tokens after it, summed over the KV heads ("cross-head": all heads of a layer
    agree). A mean, since the plain column sum grows with the number of voters and so ranks mostly
    by age. A key's weight on itself counts in the softmax but is no vote: with few later voters it
    would outweigh them. The last token, which nobody has looked at yet, scores 0. (The original
    lets only the last 32 keys vote, and without a causal mask.)

    `block`: rows of the (tokens x tokens) matrix in memory at once.
    """

    block: int = 128

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)` fp32, identical for all heads; queries are not used."""
        keys, valid = inputs.keys.float(), inputs.valid
        batch, kv_heads, tokens, _ = keys.shape
        votes = torch.zeros(batch, tokens, device=keys.device)
        for start in range(0, tokens, self.block):
            end = min(start + self.block, tokens)
            weights = causal_attention(
                keys[:, :, start:end],
                keys[:, :, :end],
                None if valid is None else valid[:, :end],
                first=start,
                scaling=inputs.scaling,
                softcap=inputs.softcap,
            )
            weights[..., start:].diagonal(dim1=-2, dim2=-1).zero_()
            votes[:, :end] += weights.sum((1, 2, 3))
        mask = inputs.valid_mask().long()
        voters = mask.sum(-1, keepdim=True) - mask.cumsum(-1)
        return (votes / voters.clamp_min(1))[:, None].expand(batch, kv_heads, tokens)
