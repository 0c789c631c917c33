"""What a store is: values of bytes under short names, each of which is whole or not there."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from nexusquant.errors import ConfigError, StoreError

Data = bytes | bytearray | memoryview
_Self = TypeVar("_Self", bound="Store")

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def is_key(text: str) -> bool:
    """1 to 200 ASCII letters, digits and `._-`, the first of them no dot."""
    return _KEY.fullmatch(text) is not None


def check_key(key: str) -> None:
    """Refuse what `is_key` does not allow: it could leave the store."""
    if not isinstance(key, str) or not is_key(key):
        raise ConfigError(
            f"{key!r:.120} is not a key of a store: give 1 to 200 ASCII letters, digits and any of"
            " `._-`, not beginning with a dot."
        )


def need(ok: bool, name: str, value: object, allowed: str) -> None:
    """Refuse an argument."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: must be {allowed}.")


class Store(ABC):
    """Bytes by key, for several processes at once.

    A reader sees the value before a `put`, none, or the one after it, never a part. None is a miss:
    any value may be gone by the next call, so callers must be able to do without. All methods raise
    `ConfigError` for what is not a key, and `StoreError` if the disk or the server fails or the
    store is closed.

    Subclasses implement the methods with an underscore, which get checked arguments.
    """

    #: For messages, without passwords.
    where: str
    _closed = False

    def get(self, key: str) -> bytes | None:
        """The whole value; None if there is none."""
        return self._read(self._checked(key), 0, None)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` (exclusive), fewer where the value ends; None if there is none.

        Two calls may read two different values if somebody writes in between.
        """
        try:
            right = 0 <= operator.index(start) <= operator.index(stop)
        except TypeError:
            right = False
        if not right:
            raise ConfigError(
                f"bytes {start!r} to {stop!r}: the range must be integers 0 <= start <= stop."
            )
        return self._read(self._checked(key), start, stop)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """`get` of each key, in as few round trips as the store can."""
        return self._read_many(self._all_checked(keys))

    def size(self, key: str) -> int | None:
        """Bytes of the value; None if there is none."""
        return self._size(self._checked(key))

    def contains(self, key: str) -> bool:
        """Whether there is a value. Looking is not a use, as reading is."""
        return self._size(self._checked(key)) is not None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """`contains` of each key, in as few round trips as the store can."""
        return self._contains_many(self._all_checked(keys))

    def put(self, key: str, data: Data) -> None:
        """Store a value in place of any before it; if that fails, the one before it stays."""
        try:
            flat = memoryview(data).cast("B")
        except TypeError as error:
            raise ConfigError(
                f"a value of type {type(data).__name__}: give contiguous bytes ({error})."
            ) from error
        self._put(self._checked(key), flat)

    def delete(self, key: str) -> None:
        """Remove the value, if there is one."""
        self._delete(self._checked(key))

    def keys(self) -> Iterator[str]:
        """The keys of all values, each once, in no order; those put meanwhile may be missing."""
        self._check_open()
        return self._keys()

    def close(self) -> None:
        """Give connections back. The store cannot be used any more; its values stay."""
        self._closed = True

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r})"

    def _checked(self, key: str) -> str:
        check_key(key)
        self._check_open()
        return key

    def _all_checked(self, keys: Sequence[str]) -> list[str]:
        if isinstance(keys, str) or not isinstance(keys, Iterable):
            raise ConfigError(f"{keys!r:.120} is no list of keys of a store: give several.")
        return [self._checked(key) for key in keys]

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.where}: the store is closed. Open it again.")

    @abstractmethod
    def _read(self, key: str, start: int, stop: int | None) -> bytes | None: ...

    @abstractmethod
    def _size(self, key: str) -> int | None: ...

    @abstractmethod
    def _put(self, key: str, data: memoryview) -> None: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...

    @abstractmethod
    def _keys(self) -> Iterator[str]: ...

    def _read_many(self, keys: list[str]) -> list[bytes | None]:
        return [self._read(key, 0, None) for key in keys]

    def _contains_many(self, keys: list[str]) -> list[bool]:
        return [self._size(key) is not None for key in keys]
