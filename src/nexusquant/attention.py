"""Attention over stored tokens and an exact tail, by the operator of their device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.kernels import operator_for
from nexusquant.kernels.base import Request
from nexusquant.mask import Mask
from nexusquant.tokens import CodedTokens, ExactTokens


def attend(
    query: Tensor,
    parts: Sequence[CodedTokens | ExactTokens],
    mask: Mask,
    *,
    frame: KeyFrame,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q k + mask) v over all tokens of `parts`.

    Args:
        query: (batch, query_heads, q_len, dim), post-RoPE.
        parts: disjoint sets of tokens, one of them of all heads; coded keys are in `frame`.
        sink_logits: (query_heads,) learned extra logit without a value (gpt-oss `s_aux`).

    Returns:
        (batch, query_heads, q_len, value_dim) in the query's dtype; zero where nothing is visible.
    """
    request = Request(query, parts, mask, frame, scaling, softcap, sink_logits)
    partial = operator_for(query.device).decode_attention(request)
    return partial.output.flatten(1, 2).to(query.dtype)
