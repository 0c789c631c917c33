"""The frame that keys are coded in: which part of their rotation is undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexusquant.math.rope import RopeTable


class KeyFrame:
    """The coordinates keys are coded in: RoPE undone up to the start of each key's page.

    k_frame = R(-anchor) k with anchor(p) = p // page * page: page 1 removes RoPE, page B leaves
    R(p mod B). Without a table, or with page 0, keys stay as the model rotated them. Rows, and
    what others derive from the table, are computed once and kept in `workspace`, which may be
    shared as long as the table does not change.
    """

    def __init__(
        self,
        table: RopeTable | None,
        page: int,
        workspace: dict[object, Any] | None = None,
    ) -> None:
        self.table, self.page = table, page
        self.workspace: dict[object, Any] = {} if workspace is None else workspace

    @property
    def rotates(self) -> bool:
        """Whether `enter` does anything."""
        return self.table is not None and self.page > 0

    def of_row(self, row: int) -> KeyFrame:
        """The frame of one batch row, for tensors of batch 1."""
        return self if self.table is None else KeyFrame(self.table.of_row(row), self.page)

    def _at(self, page: int) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        if page not in self.workspace:
            self.workspace[page] = self.table.rows(page)
        rows: tuple[Tensor, Tensor] = self.workspace[page]
        return rows

    def enter(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Post-RoPE keys (batch, heads, n, dim) at `slots` into the frame, fp32."""
        if self.table is None or not self.rotates:
            return keys.float()
        return self.table.turn(keys, slots, self._at(self.page), inverse=True)

    def leave(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Inverse of `enter`."""
        if self.table is None or not self.rotates:
            return keys.float()
        return self.table.turn(keys, slots, self._at(self.page), inverse=False)

    def adjoint(self, queries: Tensor, slots: Tensor) -> Tensor:
        """Queries as keys in the frame at `slots` see them: q . leave(k) = adjoint(q) . k."""
        if self.table is None or not self.rotates:
            return queries.float()
        cos, sin = self._at(self.page)
        return self.table.turn(queries, slots, (cos, -sin), inverse=False)

    def remove(self, x: Tensor, slots: Tensor) -> Tensor:
        """Undo RoPE entirely, whatever the page."""
        if self.table is None:
            return x.float()
        return self.table.turn(x, slots, self._at(1), inverse=True)


class QueryRope:
    """`scorers.ScoringRope` of one chunk: its queries' slots, and the positions that follow."""

    def __init__(self, frame: KeyFrame, last_slot: int, dim: int) -> None:
        self.frame, self.last_slot, self.dim = frame, last_slot, dim

    @classmethod
    def of(cls, frame: KeyFrame, last_slot: int, dim: int) -> QueryRope | None:
        """None where keys are not rotated. `last_slot`: of the last query; dim: head_dim."""
        return cls(frame, last_slot, dim) if frame.table else None

    def remove(self, queries: Tensor, step: int = 1) -> Tensor:
        """As in `ScoringRope`."""
        first = self.last_slot - step * (queries.shape[2] - 1)
        slots = torch.arange(first, self.last_slot + 1, step, device=queries.device)
        return self.frame.remove(queries, slots.view(1, 1, -1))

    def average_rotation(self, count: int) -> Tensor | None:
        """As in `ScoringRope`."""
        assert self.frame.table is not None
        return self.frame.table.average_rotation(count, self.dim)
