"""nexusquant-kv, the published package, on the same exact prefill as everybody else.

Its import package is called `nexusquant`, like ours, so the two cannot be installed together. It
is read from a wheel or a folder of its own, and is `nexusquant` only while it works.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import NotRunnable, Prefilled, Prompt

HOW_TO_GET = (
    "needs --original: the wheel from `pip download --no-deps nexusquant-kv==0.6.3` (its import"
    " name is ours, so it cannot be installed beside us), and zstandard"
)
HEADER_BYTES = 24  # the header of its own format, core/compression_accounting.py

PRESETS: dict[str, tuple[float, int, int]] = {
    "K3V2": (0.0, 3, 2),
    "K2V2": (0.0, 2, 2),
    "high": (0.35, 3, 2),
    "balanced": (0.60, 2, 2),
    "max": (0.80, 2, 2),
}
"""Name to eviction rate, key bits, value bits, as in its documentation and `_EVICT_PRESETS`."""


@dataclass
class Package:
    """The package at `path`; its modules shadow ours inside `active()` and nowhere else."""

    path: Path
    modules: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Its `nexusquant.pipeline`, in force.

        Raises:
            NotRunnable: not there, or something that it imports is missing.
        """
        if not self.path.exists():
            raise NotRunnable(f"{self.path}: no such file or folder")
        ours = _take_modules()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.path))
        importlib.invalidate_caches()
        try:
            try:
                pipeline = importlib.import_module("nexusquant.pipeline")
            except ImportError as error:
                raise NotRunnable(f"{self.path.name} cannot be imported: {error}") from error
            yield pipeline
        finally:
            sys.path.remove(str(self.path))
            self.modules = _take_modules()
            sys.modules.update(ours)


def _take_modules() -> dict[str, Any]:
    names = [name for name in sys.modules if name.split(".")[0] == "nexusquant"]
    return {name: sys.modules.pop(name) for name in names}


@dataclass(frozen=True)
class Original:
    """One of its presets; `masked=False` leaves out the mask, as its context manager does."""

    package: Package | None
    preset: str
    masked: bool = True

    @property
    def family(self) -> str:
        kind = "evicting" if PRESETS[self.preset][0] else "no eviction"
        return f"nexusquant-kv, {kind if self.masked else 'mask not applied'}"

    @property
    def name(self) -> str:
        return self.preset

    def prefill(self, prompt: Prompt) -> Prefilled:
        if self.package is None:
            raise NotRunnable(HOW_TO_GET)
        evict, key_bits, value_bits = PRESETS[self.preset]
        cache = prompt.cache_of(prompt.exact)
        with self.package.active() as pipeline:
            if evict:
                compressor = pipeline.NexusQuantEvict(
                    eviction_rate=evict, key_bits=key_bits, value_bits=value_bits
                )
            else:
                compressor = pipeline.NexusQuantQuantOnly(key_bits=key_bits, value_bits=value_bits)
            compressor.set_model_config(prompt.model.config)
            with count_codes(pipeline.E8Lattice) as count:
                result = compressor.compress(cache)
        keep = result[1].bool() if evict else None
        bits = count.bits + 8 * HEADER_BYTES + (prompt.tokens if evict else 0)  # a bit per token
        return Prefilled(
            cache, bits / prompt.elements, "counted", keep=keep if self.masked else None
        )


@dataclass
class Count:
    """Bits of all vectors quantized so far."""

    bits: float = 0.0


@contextmanager
def count_codes(lattice: Any) -> Iterator[Count]:
    """Counts what `lattice.quantize_perhead` would store, while it runs.

    It returns dequantized vectors. Their codes (twice the lattice point) are charged at their
    entropy per call, that is per layer and side. Its own format squeezes them with zstd, which
    takes 0.1 to 0.5 bits more (less only for the values of layer 0, which repeat with the
    tokens). Each vector that is not evicted has an fp16 scale.
    """
    original = lattice.quantize_perhead
    count = Count()

    def counted(x: Tensor, levels: int = 8) -> Tensor:
        out = original(x, levels=levels)
        scale = x.abs().amax(-1, keepdim=True) / (levels / 2)
        live = scale[..., 0] > 0  # evicted vectors are zero
        codes = (2 * out[live] / scale[live]).round().to(torch.int64)
        count.bits += entropy(codes) * codes.numel() + 16 * int(live.sum())
        return out

    lattice.quantize_perhead = staticmethod(counted)
    try:
        yield count
    finally:
        lattice.quantize_perhead = staticmethod(original)


def entropy(codes: Tensor) -> float:
    """Bits per entry of doubled E8 points (vectors, dim), dim a multiple of 8; 0 for no vectors.

    One entry of a group of 8 is even or odd as all of them are (apart from clipped ones), so the
    group says it once, and entries are charged at the entropy among their own kind.
    """
    if not codes.numel():
        return 0.0
    groups = codes.reshape(-1, 8)
    odd = (groups % 2).sum(-1) > 4
    bits = _order0(odd.long()) * len(groups)
    bits += sum(_order0(part) * part.numel() for part in (groups[odd], groups[~odd]))
    return bits / codes.numel()


def _order0(x: Tensor) -> float:
    share = torch.unique(x, return_counts=True)[1].double() / max(x.numel(), 1)
    return float(-(share * share.log2()).sum())
