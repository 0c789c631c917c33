"""Results as a JSON file: every field of every dataclass, and what is derived from them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from nexusquant.errors import ConfigError


def as_json(thing: Any) -> Any:
    """`thing` in what JSON has; properties of dataclasses become fields, nan and inf null."""
    if is_dataclass(thing) and not isinstance(thing, type):
        names = [field.name for field in fields(thing)]
        names += [name for name, x in vars(type(thing)).items() if isinstance(x, property)]
        return {name: as_json(getattr(thing, name)) for name in names}
    if isinstance(thing, dict):
        return {str(key): as_json(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [as_json(item) for item in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return None
    return thing if isinstance(thing, (bool, int, float)) or thing is None else str(thing)


def check_writable(path: Path) -> None:
    """Before the work starts. Raises `ConfigError` if the file could not be written after it."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--json {path}: must be a file in a folder that exists.")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `results`, replacing the file.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps(as_json(results), indent=1, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot write it ({error.strerror}).") from error
