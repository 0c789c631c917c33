"""Reading a JSON description that may be hostile: every member is checked as it is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nexusquant.errors import FormatError


class Fields:
    """A JSON object of a file.

    Args:
        value: what is there.
        where: what messages call it.

    Raises:
        FormatError: it is no object; so do all methods for what is not as they say.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: an object is expected.")
        self._value, self.where = value, where
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """A member, whatever it is."""
        if name not in self._value:
            raise FormatError(f"{self.where}: {name!r} is missing.")
        self._read.add(name)
        return self._value[name]

    def fail(self, name: str, allowed: str) -> FormatError:
        """The error that a member is not what is allowed."""
        return FormatError(f"{self.where}: {name} must be {allowed}.")

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A number with a fraction from `low` to `high`."""
        value = self.get(name)
        if type(value) is not float or not low <= value <= high:
            raise self.fail(name, f"a number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if type(value) is not bool:
            raise self.fail(name, "true or false")
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """One of some strings."""
        value = self.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.fail(name, "one of " + ", ".join(allowed))
        return value

    def pair(self, name: str, allowed: Collection[str]) -> list[str]:
        """Two of some strings, the same or not."""
        value = self.items(name)
        if len(value) != 2 or any(x not in allowed for x in value):
            raise self.fail(name, "two of " + ", ".join(allowed))
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def items(self, name: str) -> list[Any]:
        """An array."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "an array")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._value

    def is_null(self, name: str) -> bool:
        """Whether a member is null."""
        return self.get(name) is None

    def part(self, name: str) -> Fields:
        """An object."""
        return Fields(self.get(name), f"{self.where}, {name}")

    def parts(self, name: str) -> list[Fields]:
        """An array of objects."""
        return [
            Fields(value, f"{self.where}, {name} {i}") for i, value in enumerate(self.items(name))
        ]

    def close(self) -> None:
        """Everything was read: other members mean something that nobody here knows."""
        if unknown := sorted(set(self._value) - self._read):
            raise FormatError(f"{self.where}: unknown members {', '.join(map(repr, unknown))}.")
