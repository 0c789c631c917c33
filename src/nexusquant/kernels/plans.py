"""What operators work out once per set of coded parts, and use until one of them changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from nexusquant.kernels.base import Coded

T = TypeVar("T")


class Plans(Generic[T]):
    """Plans by the very parts they are of, which they do not keep alive."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[tuple[weakref.ref[Coded], ...], T]] = {}

    def of(self, parts: Sequence[Coded], make: Callable[[], T]) -> T:
        """The plan of these parts (of no part: a new one)."""
        if not parts:
            return make()
        key = id(parts[0])  # forgotten as that dies
        known = self._held.get(key)
        if known is not None:
            held, plan = known
            if len(held) == len(parts) and all(
                one() is part for one, part in zip(held, parts, strict=True)
            ):
                return plan
        plan = make()
        if known is None:
            weakref.finalize(parts[0], self._held.pop, key, None)
        self._held[key] = tuple(map(weakref.ref, parts)), plan
        return plan


def one_space(parts: Sequence[Coded]) -> bool:
    """Whether all parts are in the same code space."""
    return all(
        part.book == parts[0].book
        and all(a.same(b) for a, b in zip(part.spaces, parts[0].spaces, strict=True))
        for part in parts[1:]
    )
