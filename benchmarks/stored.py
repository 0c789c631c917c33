"""Competitors that store: what a prefix takes on disk, and what it is worth when it comes back.

Their sizes are of real files or of real compressed bytes, except for CacheGen's arithmetic coder,
which gets the entropy of its own symbols, without any table: less than any coder could reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.competitors import Competitor, Prefilled, Prompt
from nexusquant import PRESETS, CompressionConfig, nxq
from nexusquant.entropy.profile import StoreProfile
from nexusquant.extras import need
from nexusquant.prefix import coded, decoded
from nexusquant.prefix.live import live_streams
from nexusquant.prefix.restore import stock_cache
from nexusquant.prefix.source import sources
from nexusquant.profile import Profile


@dataclass(frozen=True)
class Entropy:
    """Our storage codec."""

    bits: float
    profile: Callable[[], StoreProfile]
    family: str = "ours, entropy coded"

    @property
    def name(self) -> str:
        return f"{self.bits} bits"

    def prefill(self, prompt: Prompt) -> Prefilled:
        exact, profile = sources(prompt.cache_of(prompt.exact)), self.profile()
        header, streams = coded.encode_prefix(exact, prompt.model, profile, self.bits, _quiet)
        data = nxq.pack(header, streams)
        found = decoded.decode_prefix(nxq.Reader.open(data), prompt.model, profile, _quiet)
        bits = 8 * len(data) / prompt.elements
        return Prefilled(stock_cache(found, prompt.model), bits, "measured")


def _quiet(step: str) -> None:
    """Nobody to report to."""


@dataclass(frozen=True)
class LiveCodes:
    """The codes of a live cache as a file."""

    codec: str
    name: str
    config: CompressionConfig
    profile: Callable[[], Profile]

    @property
    def family(self) -> str:
        return f"ours, live codes, {self.codec}"

    def prefill(self, prompt: Prompt) -> Prefilled:
        cache = prompt.compressed(self.config, self.profile())
        data = nxq.pack(*live_streams(cache, self.codec))
        return Prefilled(cache, 8 * len(data) / prompt.elements, "measured")


@dataclass(frozen=True)
class IntZstd:
    """Integers with an fp16 scale per vector, keys as rotated, then zstd at its default level."""

    bits: int
    family: str = "int + zstd"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def prefill(self, prompt: Prompt) -> Prefilled:
        pairs, size = [], 0
        for pair in prompt.exact:
            back = []
            for x in pair:
                scale = x.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1)
                scale = scale.clamp(min=6e-8).half().float().clamp(min=6e-8)
                q = (x.float() / scale).round().clamp(-(2 ** (self.bits - 1)), 2**self.bits)
                size += _zstd(q.to(torch.int8)) + 2 * scale.numel()
                back.append((q * scale).to(x.dtype))
            pairs.append((back[0], back[1]))
        return Prefilled(prompt.cache_of(pairs), 8 * size / prompt.elements, "measured")


def _zstd(x: Tensor) -> int:
    return len(need("zstandard").ZstdCompressor().compress(x.contiguous().numpy().tobytes()))


@dataclass(frozen=True)
class CacheGen:
    """After CacheGen (Liu et al. 2024, arXiv 2310.07240): groups of ten tokens, the first of each
    in 8 bits, the others as differences to it, in steps that grow with depth in thirds of the
    layers, entropy coded with frequencies of every layer and channel.

    Attributes:
        step: in deviations of a channel's differences, in the first third.
    """

    step: float
    family: str = "CacheGen-style"
    group: int = 10

    @property
    def name(self) -> str:
        return f"step {self.step}"

    def prefill(self, prompt: Prompt) -> Prefilled:
        pairs, bits = [], 0.0
        for index, pair in enumerate(prompt.exact):
            step = self.step * (1, 1.5, 2)[3 * index // len(prompt.exact)]
            back = []
            for x in pair:
                y, taken = self._coded(x[0].transpose(0, 1).flatten(1).float(), step)
                back.append(y.unflatten(1, x.shape[1::2]).transpose(0, 1)[None].to(x.dtype))
                bits += taken
            pairs.append((back[0], back[1]))
        return Prefilled(prompt.cache_of(pairs), bits / prompt.elements, "counted")

    def _coded(self, x: Tensor, step: float) -> tuple[Tensor, float]:
        """Tokens x (tokens, channels) as they come back, and their bits."""
        first = x[:: self.group]
        scale = (first.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
        anchors = (first / scale).round()
        base = (anchors * scale).repeat_interleave(self.group, 0)[: len(x)]
        rest = torch.arange(len(x)) % self.group != 0
        apart = (x - base)[rest]
        size = step * apart.std(0).clamp(min=1e-8)
        symbols = (apart / size).round()
        y = base.clone()
        y[rest] += symbols * size
        taken = _entropy(symbols) + _entropy(anchors) + 16 * len(first) + 16 * x.shape[1]
        return y, taken


def _entropy(symbols: Tensor) -> float:
    """Bits of integers (n, channels) under the best static code of every channel."""
    at = (symbols - symbols.min()).long()
    width = int(at.max()) + 1
    where = at + torch.arange(at.shape[1]) * width
    counts = torch.bincount(where.flatten(), minlength=at.shape[1] * width).double()
    share = counts / len(at)
    return float(-(counts * share.clamp(min=1e-12).log2()).sum())


BITS = (4.0, 2.5, 2.0, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.48)


def storage(profile: Callable[[], Profile], store: Callable[[], StoreProfile]) -> list[Competitor]:
    """Ours first."""
    field: list[Competitor] = [Entropy(bits, store) for bits in BITS]
    field += [
        LiveCodes(codec, name, PRESETS[name], profile)
        for codec in ("raw", "zstd", "zstd+delta")
        for name in ("lossless", "high", "balanced", "max")
    ]
    field += [CacheGen(step) for step in (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)]
    field += [IntZstd(bits) for bits in (8, 6, 5, 4, 3)]
    return field
