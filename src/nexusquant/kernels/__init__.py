"""The three operations on codes, and who does them on which device.

An operator (`base.Operator`) encodes, decodes and attends. `reference` is the specification, `cpu`
needs Numba, `gpu` Triton. `NEXUSQUANT_OPERATOR=reference`, or `use_operator`, overrides the choice.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache

import torch

from nexusquant.errors import ConfigError
from nexusquant.kernels.base import Operator

_KNOWN = {
    "triton": ("cuda", "nexusquant.kernels.gpu.operator", "Triton"),
    "numba": ("cpu", "nexusquant.kernels.cpu.operator", "Numba"),
    "reference": ("", "nexusquant.kernels.reference", "Reference"),
}
"""Name to the device that it is for ("" for any), module and class; first the fastest. What is
named like a package needs it."""
_forced: str | None = os.environ.get("NEXUSQUANT_OPERATOR") or None


def operator_for(device: torch.device) -> Operator:
    """The operator in force on a device.

    Raises:
        ConfigError: the one asked for is unknown, or what it needs is not installed. (One for
            another device is passed over.)
    """
    return _chosen(device.type, _forced)


def use_operator(name: str | None) -> str | None:
    """Use an operator by name wherever it can run; None: the fastest there is.

    Returns:
        The name in force before.

    Raises:
        ConfigError: unknown, or what it needs is not installed.
    """
    global _forced
    if name is not None:
        _made(name)
    before, _forced = _forced, name
    return before


def operators(device: str) -> dict[str, str]:
    """Every operator for a type of device, with "" or the reason why it cannot run."""
    found = {}
    for name, (kind, _, _) in _KNOWN.items():
        if kind in ("", device):
            try:
                _made(name)
                found[name] = ""
            except ConfigError as error:
                found[name] = str(error)
    return found


@lru_cache(maxsize=32)
def _chosen(device: str, forced: str | None) -> Operator:
    if forced is not None:
        made = _made(forced)
        if _KNOWN[forced][0] in ("", device):
            return made
    name = next(name for name, reason in operators(device).items() if not reason)
    return _made(name)


@lru_cache(maxsize=8)
def _made(name: str) -> Operator:
    if name not in _KNOWN:
        raise ConfigError(f"unknown operator {name!r}; known: {', '.join(_KNOWN)}.")
    _, module, kind = _KNOWN[name]
    try:
        made: Operator = getattr(importlib.import_module(module), kind)()
    except ImportError as error:
        raise ConfigError(f"operator {name!r} cannot run: {error}. pip install {name}") from error
    return made
