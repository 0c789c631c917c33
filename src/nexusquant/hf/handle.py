"""What a compact layer's `update` returns: K and V by name only, without storage.

A handle has the logical shape of the tensor it stands for. Our attention function reads its
snapshot; any other operation materialises it, so models that touch K or V in between still work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nexusquant.compressor import Stored
from nexusquant.errors import UnsupportedError
from nexusquant.kernels.base import spread
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens, ExactTokens

if TYPE_CHECKING:
    from nexusquant.hf.layer import CompactLayer


@dataclass(frozen=True)
class Snapshot:
    """One layer at one `update`: the stored past, the uncoded tail including the new tokens.

    Args:
        tail_keys, tail_values: (batch, kv_heads, tail, dim) at slots tail_start, tail_start + 1...
        new: how many of them came with this call.
        first_column: slot that column 0 of the attention mask stands for.
    """

    layer: CompactLayer
    stored: Stored
    tail_keys: Tensor
    tail_values: Tensor
    tail_start: int
    new: int
    first_column: int

    @property
    def length(self) -> int:
        """Logical length, the new tokens included."""
        return self.tail_start + self.tail_keys.shape[2]

    @property
    def visible(self) -> int:
        """Length of the K and V that an uncompressed layer would return."""
        return self.length - self.first_column

    @property
    def compressed(self) -> bool:
        """Whether visible slots left the tail (possibly as padding, of which nothing is stored)."""
        return self.tail_start > self.first_column

    def parts(self) -> list[CodedTokens | ExactTokens]:
        """Everything to attend to."""
        tail = ExactTokens(
            self.tail_keys, self.tail_values, Slots(self.tail_start, self.tail_keys.shape[2])
        )
        return [*self.stored.parts(), tail]

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as the uncompressed layer would return them (decoded where coded).

        Raises:
            UnsupportedError: tokens were evicted, so there is no such tensor.
        """
        if not self.compressed:
            surplus = self.first_column - self.tail_start
            return self.tail_keys[:, :, surplus:], self.tail_values[:, :, surplus:]
        frame = self.layer.frame()
        out = []
        total = self.length
        for name in ("keys", "values"):
            reference = self.tail_keys if name == "keys" else self.tail_values
            shape = (*reference.shape[:2], total, reference.shape[-1])
            whole = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
            seen = torch.zeros(*reference.shape[:2], total, dtype=torch.bool, device=whole.device)
            for part in self.parts():
                at = part.slots.positions(part.device).expand(len(reference), part.kv_heads, -1)
                if isinstance(part, ExactTokens):
                    x = part.keys if name == "keys" else part.values
                elif name == "keys":
                    x = frame.leave(part.keys(), at)
                else:
                    x = part.values()
                x, at = (spread(y, part.heads, shape[1], fill) for y, fill in ((x, 0), (at, -1)))
                filled = at >= 0
                index = at.clamp(min=0)
                whole.scatter_add_(
                    2,
                    index[..., None].expand_as(x),
                    torch.where(filled[..., None], x, 0).to(whole.dtype),
                )
                seen |= (
                    torch.zeros_like(seen, dtype=torch.uint8)
                    .scatter_add(2, index, filled.to(torch.uint8))
                    .bool()
                )
            if not bool(seen[:, :, self.first_column :].all()):
                raise UnsupportedError(
                    f"layer {self.layer.layer_idx} has evicted or padded tokens, so its keys and"
                    " values do not exist as one tensor. This model reads them outside its"
                    " attention function; use evict_ratio=0 without padding, or an uncompressed"
                    " cache."
                )
            out.append(whole[:, :, self.first_column :])
        return out[0], out[1]


class KVHandle(torch.Tensor):
    """Tensor subclass without storage for the K or V of a `Snapshot`."""

    snapshot: Snapshot
    which: int

    # torch documents assigning this to leave everything to __torch_dispatch__, but its stub
    # declares a method, so no assignment type-checks.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, snapshot: Snapshot, which: int) -> KVHandle:
        like = (snapshot.tail_keys, snapshot.tail_values)[which]
        shape = (*like.shape[:2], snapshot.visible, like.shape[-1])
        handle = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        handle.snapshot, handle.which = snapshot, which
        return handle

    def __init__(self, *_: Any) -> None:
        super().__init__()

    # torch.Tensor's stub has the keyword tensor_contents; a handle has no contents to be given, and
    # accepting any keyword is wider at run time, which mypy does not see.
    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"KVHandle({'KV'[self.which]}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def materialize(self) -> Tensor:
        """The real tensor, contiguous as the handle claims to be."""
        return self.snapshot.dense()[self.which].contiguous()

    # torch calls this as a classmethod (func, types, args, kwargs); its stub declares an instance
    # method with other parameters, so no correct override matches it.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def real(x: Any) -> Any:
            return x.materialize() if isinstance(x, KVHandle) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))
