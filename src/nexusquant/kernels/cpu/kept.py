"""Compiled kernels on disk, found by every process and environment of a machine.

Numba's own cache lies beside the package or goes by its path, and one index file per function is
shared by all who write. Here each kernel is a file of its own in a folder that names everything
that it depends on, so that there is nothing to agree on: it appears whole or not at all, and two
who write it write the same.
"""

from __future__ import annotations

import pickle
import platform
import sys
import warnings
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from nexusquant.errors import NexusQuantWarning, StoreError
from nexusquant.folders import cache_dir
from nexusquant.kernels.cpu.sources import SOURCES
from nexusquant.nxq import atomic_file

_DIGEST = 32


def folder() -> Path | None:
    """Where the kernels of this package, Numba, Python and CPU are kept; None: nowhere.

    In `kernels` of the user's cache directory, or in `nexusquant` of Numba's if the user chose one
    (`NUMBA_CACHE_DIR`).
    """
    # No stubs: mypy reads Numba's sources, where settings are assigned through globals().
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        base = Path(chosen) / "nexusquant" if chosen else cache_dir() / "kernels"
    except RuntimeError:  # a user without a home
        return None
    return base / _key()


@lru_cache(maxsize=1)
def _key() -> str:
    """What kernels depend on, as the name of a folder."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    package = import_module("nexusquant").__version__
    versions = package, numba.__version__, llvmlite.__version__, np.__version__
    python = sys.implementation.cache_tag, platform.python_version()
    everything = repr((SOURCES, versions, python, triple, cpu, features))
    digest = blake2b(everything.encode(), digest_size=6).hexdigest()
    return f"{versions[0]}-numba{versions[1]}-{cpu}-{digest}"


class Kept(NullCache):
    """What Numba asks for a kernel, and hands one that it has compiled."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def path(self) -> Path | None:
        """Its file, whether there is one or not."""
        where = folder()
        return None if where is None else where / f"{self.name}.bin"

    def read(self) -> bytes | None:
        """What was kept; None if there is nothing, or it is damaged."""
        path = self.path
        try:
            data = path.read_bytes() if path is not None and path.is_file() else b""
        except OSError:  # nothing there, or not for us: compiled again
            return None
        digest, payload = data[:_DIGEST], data[_DIGEST:]
        return payload if payload and self._digest(payload) == digest else None

    def _digest(self, payload: bytes) -> bytes:
        """A file that has another kernel's name is damaged, too."""
        return blake2b(self.name.encode() + b"\0" + payload, digest_size=_DIGEST).digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel; None to have it compiled."""
        target_context.refresh()
        payload = self.read()
        if payload is None:
            return None
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # of whatever type: compiling it again is always right
            return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep it, or say once that it cannot be."""
        payload, path = dumps(cres._reduce()), self.path
        try:
            if path is None:
                raise StoreError("this user has no home directory.")
            with atomic_file(path) as file:
                file.write(self._digest(payload) + payload)
        except (OSError, StoreError) as error:
            _warn_once(str(error))


@lru_cache(maxsize=1)
def _once() -> list[str]:
    return []


def _warn_once(reason: str) -> None:
    if not _once():
        _once().append(reason)
        warnings.warn(
            f"compiled kernels cannot be kept, so every process compiles them anew: {reason}"
            " Set XDG_CACHE_HOME or NUMBA_CACHE_DIR to a folder that can be written to.",
            NexusQuantWarning,
            stacklevel=2,
        )
