"""One small class per competitor: from a prompt to a cache to continue from, and its size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import QuantizedCache

from benchmarks import lloyd_max
from nexusquant import CompressionConfig, NexusCache
from nexusquant.accounting import tensors_in
from nexusquant.hf.cache import plain_cache
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.second_pass import reads_twice
from nexusquant.profile import Profile

KV = tuple[Tensor, Tensor]
How = Literal["measured", "counted"]


class NotRunnable(Exception):
    """A competitor cannot run here; the message says why."""


@dataclass(frozen=True)
class Prompt:
    """What every competitor starts from.

    Attributes:
        ids: (1, tokens) int64.
        exact: keys (after RoPE) and values of every layer from one uncompressed prefill, each
            (1, kv_heads, tokens, head_dim). Shared: nobody may write to them.
        recorded: the same prefill in a cache of ours that has not compressed it yet.
    """

    model: Any
    ids: Tensor
    exact: tuple[KV, ...]
    recorded: NexusCache

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> Prompt:
        """Runs the uncompressed prefill."""
        recorded = NexusCache(model, CompressionConfig())
        recorded.activate_past_recording()
        with torch.no_grad():
            model(ids, **cache_argument(model, recorded), use_cache=True, logits_to_keep=1)
        cache = plain_cache(model)
        for index, layer in enumerate(recorded.layers):
            cache.update(layer.tail.keys, layer.tail.values, index)
        exact = tuple((layer.keys, layer.values) for layer in cache.layers)
        return cls(model, ids, exact, recorded)

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])

    @property
    def elements(self) -> int:
        """Elements of the uncompressed keys and values."""
        return sum(x.numel() for pair in self.exact for x in pair)

    def compressed(self, config: CompressionConfig, profile: Profile | None) -> NexusCache:
        """What the prompt leaves in a cache with that config: attention over a prompt is exact, so
        one pass serves them all. Except where a scorer reads it twice or it builds the profile.
        """
        fresh = NexusCache(self.model, config, profile=profile)
        builds = config.codec == "e8" and config.transform == "klt" and fresh.profile is None
        if builds or reads_twice(config, self.tokens):
            given = cache_argument(self.model, fresh)
            self.model(self.ids, **given, use_cache=True, logits_to_keep=1)
            return fresh
        cache = copy.deepcopy(self.recorded)
        for layer, other in zip(cache.layers, fresh.layers, strict=True):
            layer.config, layer.profiles, layer.record_past = other.config, other.profiles, False
        cache.crop(0)
        return cache

    def cache_of(self, pairs: Iterable[KV], cache: Any = None) -> Any:
        """`cache`, or the model's own kind, filled with keys and values of every layer."""
        cache = plain_cache(self.model) if cache is None else cache
        for index, (keys, values) in enumerate(pairs):
            cache.update(keys.clone(), values.clone(), index)
        return cache


@dataclass(frozen=True)
class Prefilled:
    """A cache to continue from.

    Attributes:
        bits: per element of the uncompressed cache.
        how: "measured" from the allocated tensors, or "counted" from the format.
        keep: (1, tokens) bool, the tokens that may still be attended to; None for all, or where
            the cache sees to that itself.
    """

    cache: Any
    bits: float
    how: How
    keep: Tensor | None = None


class Competitor(Protocol):
    """`family` is a line in the plot, `name` a point on it."""

    @property
    def family(self) -> str: ...

    @property
    def name(self) -> str: ...

    def prefill(self, prompt: Prompt) -> Prefilled:
        """Raises `NotRunnable` if a package is missing or does not take this model."""
        ...


@dataclass(frozen=True)
class Uncompressed:
    """The exact prefill itself: what the others are compared with."""

    family: str = "uncompressed"
    name: str = "fp16"

    def prefill(self, prompt: Prompt) -> Prefilled:
        return Prefilled(prompt.cache_of(prompt.exact), 16.0, "counted")


@dataclass(frozen=True)
class Nexus:
    """This package, measured; `profile` is the model's, shared by all sequences."""

    family: str
    name: str
    config: CompressionConfig
    profile: Callable[[], Profile] | None = None

    def prefill(self, prompt: Prompt) -> Prefilled:
        cache = self._run(prompt, self.config)
        return Prefilled(cache, cache.bits_per_element, "measured")

    def _run(self, prompt: Prompt, config: CompressionConfig) -> NexusCache:
        return prompt.compressed(config, self.profile() if self.profile else None)


class EvictionOnly(Nexus):
    """Kept tokens as they are, counted in fp16; positions and the rest as held."""

    def prefill(self, prompt: Prompt) -> Prefilled:
        cache = self._run(prompt, self.config)
        held = [layer.tensors() for layer in cache.layers]
        return Prefilled(cache, 8 * counted_bytes(held) / prompt.elements, "counted")


@dataclass(frozen=True)
class LloydMax:
    """Random rotation, fp16 norm per vector, scalar Lloyd-Max levels; dequantized values.

    The first `sinks` tokens stay exact, as in our pipeline, so that the codes are compared.
    """

    bits: int
    sinks: int = 4
    family: str = "scalar Lloyd-Max"

    @property
    def name(self) -> str:
        return f"{self.bits} bits"

    def prefill(self, prompt: Prompt) -> Prefilled:
        def coded(x: Tensor) -> Tensor:
            return torch.cat(
                [x[..., : self.sinks, :], lloyd_max.round_trip(x[..., self.sinks :, :], self.bits)],
                dim=-2,
            )

        cache = prompt.cache_of((coded(keys), coded(values)) for keys, values in prompt.exact)
        sizes = [
            (x.numel(), lloyd_max.bits_per_element(self.bits, x.shape[-1], x.shape[-2], self.sinks))
            for pair in prompt.exact
            for x in pair
        ]
        bits = sum(count * each for count, each in sizes) / prompt.elements
        return Prefilled(cache, bits, "counted")


@dataclass(frozen=True)
class TransformersQuantized:
    """transformers' `QuantizedCache`: packed codes as held, scales and zeros counted in fp16.

    The residual length is such that the prompt is coded once and what follows stays exact: by
    default a flush would code everything again, which costs time and changes nothing here.
    """

    backend: str
    bits: int
    axis_key: int
    axis_value: int
    group: int = 64

    @property
    def family(self) -> str:
        return f"QuantizedCache {self.backend}"

    @property
    def name(self) -> str:
        return f"{self.bits} bits, axes {self.axis_key}/{self.axis_value}"

    def prefill(self, prompt: Prompt) -> Prefilled:
        try:
            cache = QuantizedCache(
                self.backend, prompt.model.config, nbits=self.bits, axis_key=self.axis_key,
                axis_value=self.axis_value, q_group_size=self.group, residual_length=1 << 30,
            )  # fmt: skip
            prompt.cache_of(prompt.exact, cache)
        except (ImportError, ValueError) as error:
            raise NotRunnable(str(error).split(". Please")[0].strip()) from error
        held = [
            [layer._quantized_keys, layer._quantized_values, layer.keys, layer.values]
            for layer in cache.layers
        ]
        return Prefilled(cache, 8 * counted_bytes(held) / prompt.elements, "counted")


def counted_bytes(thing: Any) -> int:
    """Bytes of all tensors of `thing`, with floating point at no more than 2 bytes an element.

    Storage is counted once and as a whole. Float32 counts as fp16, which is what the same cache
    holds for an fp16 model. Wrapper subclasses (quanto's) count as the tensors inside.
    """
    found = {}
    for outer in tensors_in(thing):
        for tensor in _inner(outer):
            storage = tensor.untyped_storage()
            size = tensor.element_size()
            wide = tensor.is_floating_point() and size > 2
            found[storage.data_ptr()] = storage.nbytes() * 2 // size if wide else storage.nbytes()
    return sum(found.values())


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _inner(getattr(tensor, name))
    else:
        yield tensor
