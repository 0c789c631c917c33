"""Stand-ins for what the connector works with: a store in memory, and a clock."""

from __future__ import annotations

from collections.abc import Iterator

from nexusquant.errors import StoreError
from nexusquant.stores import Store


class Memory(Store):
    """A store in memory that can be down, and counts what it is asked."""

    where = "memory"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.down = False
        self.asked = 0

    def _check(self) -> None:
        self.asked += 1
        if self.down:
            raise StoreError("memory: down")

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        self._check()
        return self.values.get(key)

    def _size(self, key: str) -> int | None:
        self._check()
        return len(self.values[key]) if key in self.values else None

    def _put(self, key: str, data: memoryview) -> None:
        self._check()
        self.values[key] = bytes(data)

    def _delete(self, key: str) -> None:
        self.values.pop(key, None)

    def _keys(self) -> Iterator[str]:
        return iter(list(self.values))


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
