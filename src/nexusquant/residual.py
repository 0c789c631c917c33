"""What a layer's attention output goes through, and the residual stream that it goes into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputSide:
    """Unless projection and residual are known, errors are relative to the attention output itself.

    Attributes:
        projection: (hidden, query_heads x value_dim) weight of the output projection; None if it
            cannot be read.
        residual: (batch, tokens, hidden) residual stream of the chunk, None if unknown.
        behind: (hidden,) weight of a norm that the projected output goes through.
        readers: (norms, hidden) weights of norms that read the stream.
    """

    projection: Tensor | None = None
    residual: Tensor | None = None
    behind: Tensor | None = None
    readers: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether projection and residual stream are known."""
        return self.projection is not None and self.residual is not None

    def as_read(self, stream: Tensor | None) -> tuple[Tensor | None, float | None]:
        """The projection, and the squared norm of what is added where a norm behind it sets that.

        Channels count as the norms that read the stream pass them on, 1 on average: channel i with
        sum_r g_ri^2 / E|g_r x|^2 for readers with weights g_r. Some models keep channels a thousand
        times larger than all others, which their norms all but switch off: noise there is harmless.

        Args:
            stream: (tokens, hidden) fp32, some of the residual stream.
        """
        if self.projection is None:
            return None, None
        squares = torch.ones(len(self.projection), device=self.projection.device)
        if self.readers is not None and stream is not None:
            readers = self.readers.to(stream.device).square()
            size = readers @ stream.square().mean(0)
            squares = (readers / size.clamp(min=1e-12)[:, None]).sum(0).to(squares.device)
            squares = squares / squares.mean().clamp(min=1e-12)
        added = None
        if self.behind is not None:
            squares = squares * self.behind.square()
            added = float(squares.sum())
        return self.projection.detach().float() * squares.sqrt()[:, None], added
