"""JSON with one encoding for every value: what the header of an .nxq file is written in."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 16
MAX_INT = (1 << 53) - 1  # what every JSON parser reads exactly


def encode(value: Any) -> bytes:
    """UTF-8, keys sorted by code point, no spaces; ValueError for what JSON cannot say exactly."""
    _check(value, 1)
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")  # fails on half a surrogate pair


def decode(raw: bytes) -> Any:
    """The value that `encode` gave these bytes; ValueError for any others.

    Comparing with the encoding refuses at once duplicate and unsorted keys, spaces and needless
    escapes.
    """
    text = raw.decode("utf-8")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if encode(value) != raw:
        raise ValueError("keys unsorted or twice, or spaces or escapes that need not be")
    return value


def _check(value: Any, depth: int) -> None:
    """Only JSON's types, finite numbers, exact integers, bounded nesting."""
    if isinstance(value, (dict, list, tuple)):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r} is not a string")
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, depth + 1)
    elif isinstance(value, int):
        if abs(value) > MAX_INT:
            raise ValueError("an integer of more than 53 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("NaN or infinity")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} is no type of JSON")


def _integer(digits: str) -> int:
    """Bounded before `int` spends time on a million digits."""
    if len(digits) > 17:
        raise ValueError("an integer of more than 53 bits")
    return int(digits)
