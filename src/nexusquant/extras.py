"""Packages that only some parts of nexusquant need."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

from nexusquant.errors import UnsupportedError


@lru_cache(maxsize=16)
def need(package: str, extra: str = "store") -> Any:
    """The package, imported.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UnsupportedError(
            f"this needs {package}, which is not installed: pip install"
            f' "nexusquant[{extra}]" ({error}).'
        ) from error
