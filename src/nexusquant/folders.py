"""Where files of this user are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where nexusquant keeps files of this user: `$XDG_CACHE_HOME` or `~/.cache`, `/nexusquant`.

    Raises:
        RuntimeError: neither is set, and this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexusquant"
