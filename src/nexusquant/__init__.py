"""NexusQuant: training-free compression of the KV cache of Hugging Face causal LMs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexusquant import evaluate
    from nexusquant.calibration import calibrate, calibrate_store
    from nexusquant.codec import NexusQuantSimple
    from nexusquant.config import PRESETS, CompressionConfig
    from nexusquant.errors import (
        ConfigError,
        FormatError,
        NexusQuantError,
        NonFiniteError,
        ProfileError,
        StoreError,
        UnsupportedError,
    )
    from nexusquant.hf.cache import NexusCache, attach
    from nexusquant.hf.context import nexusquant_evict
    from nexusquant.hf.store_profiles import load_store_profile, save_store_profile
    from nexusquant.prefix.loading import load
    from nexusquant.prefix.saving import save
    from nexusquant.profile_store import load_profile, save_profile
    from nexusquant.scorers import register_scorer

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CompressionConfig",
    "ConfigError",
    "FormatError",
    "NexusCache",
    "NexusQuantError",
    "NexusQuantSimple",
    "NonFiniteError",
    "ProfileError",
    "StoreError",
    "UnsupportedError",
    "__version__",
    "attach",
    "calibrate",
    "calibrate_store",
    "evaluate",
    "load",
    "load_profile",
    "load_store_profile",
    "nexusquant_evict",
    "register_scorer",
    "save",
    "save_profile",
    "save_store_profile",
]

_HOMES = {
    "PRESETS": "config",
    "CompressionConfig": "config",
    "ConfigError": "errors",
    "FormatError": "errors",
    "NexusCache": "hf.cache",
    "NexusQuantError": "errors",
    "NexusQuantSimple": "codec",
    "NonFiniteError": "errors",
    "ProfileError": "errors",
    "StoreError": "errors",
    "UnsupportedError": "errors",
    "attach": "hf.cache",
    "calibrate": "calibration",
    "calibrate_store": "calibration",
    "load": "prefix.loading",
    "load_profile": "profile_store",
    "load_store_profile": "hf.store_profiles",
    "nexusquant_evict": "hf.context",
    "register_scorer": "scorers",
    "save": "prefix.saving",
    "save_profile": "profile_store",
    "save_store_profile": "hf.store_profiles",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `nexusquant --version` does not wait for torch."""
    if name == "evaluate":
        return import_module("nexusquant.evaluate")
    if name in _HOMES:
        return getattr(import_module(f"nexusquant.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nexusquant' has no attribute {name!r}")
