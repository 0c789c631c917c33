"""Prefixes as entropy-coded streams, and back (docs/FORMAT.md, codec "entropy")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.entropy.importance import FINER, UNIT, extra_steps
from nexusquant.entropy.layer import PAGE, LayerCode
from nexusquant.entropy.profile import StoreProfile
from nexusquant.errors import NonFiniteError, ProfileError, UnsupportedError
from nexusquant.extras import need
from nexusquant.prefix.rotary import CachedLayer, cached_layers
from nexusquant.prefix.source import LayerSource
from nexusquant.tokens import narrowed

NAME = "entropy"
VERSION = 1
"""Of the codec: what a page's bytes and the profile's numbers mean."""
SINKS = 4
"""First tokens, which are outliers and stored as they are."""
FUTURE = 512
"""Positions that queries are expected at: those that follow."""
MOST_HIDDEN = 1 << 18
"""Positions before the first that any layer holds: a live cache has to know their rotation."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Report = Callable[[str], None]


def encode_prefix(
    layers: list[LayerSource],
    model: nn.Module,
    profile: StoreProfile,
    bits: float,
    report: Report,
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Header and streams of a prefix.

    Args:
        bits: per element, sinks apart.

    Raises:
        ProfileError: the profile lacks a layer, or has other shapes.
        NonFiniteError: NaN or infinity.
        UnsupportedError: the cache of another model, or layers that are no plain attention.
    """
    tokens = layers[0].start + layers[0].keys.shape[1]
    cached = cached_layers(model)
    if len(layers) != len(cached) or any(
        (x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) != cached[i].shape
        or x.start > hidden(cached[i], tokens)
        for i, x in enumerate(layers)
    ):
        raise UnsupportedError(
            "this cache has other layers than this model makes: is it another's?"
        )
    if missing := [i for i in range(len(layers)) if i not in profile.layers]:
        raise ProfileError(
            f"the storage profile does not know layers {missing}: codec='raw' saves them as they"
            " are in a compressed cache."
        )
    check_shapes(profile, cached)
    if min(x.start for x in layers) > MOST_HIDDEN:
        raise UnsupportedError(f"all layers begin behind {MOST_HIDDEN} tokens: too far to save.")
    if not all(bool(torch.isfinite(x).all()) for y in layers for x in (y.keys, y.values)):
        raise NonFiniteError("NaN or infinity in keys or values: this cache cannot be saved.")
    report("expected attention")
    extra = [_extra(x, profile, i, cached[i]) for i, x in enumerate(layers)]
    framed = [_framed(x, cached[i]) for i, x in enumerate(layers)]
    step = _step_for(bits, profile, framed, extra)
    streams = {}
    for index, layer in enumerate(layers):
        report(f"layer {index + 1} of {len(layers)}")
        pages = LayerCode(profile, index, step).encode(*framed[index], extra[index])
        streams[f"layer.{index}"] = [_first(layer, extra[index]), *pages]
    dtype = str(layers[0].keys.dtype).removeprefix("torch.")
    meta = {
        "codec": NAME,
        "dtype": dtype,
        "page": PAGE,
        "profile": profile.digest,
        "starts": [layer.start for layer in layers],
        "step": step,
        "tokens": tokens,
        "version": VERSION,
    }
    return meta, streams


def check_shapes(profile: StoreProfile, cached: dict[int, CachedLayer]) -> None:
    if profile.shapes != {index: layer.shape for index, layer in cached.items()}:
        raise ProfileError(
            "the storage profile has other layers than this model, or of other shapes."
        )


def hidden(layer: CachedLayer, tokens: int) -> int:
    """How many of the first tokens no later query of this layer sees."""
    return 0 if layer.window is None else max(tokens - layer.window + 1, 0)


def _extra(layer: LayerSource, profile: StoreProfile, index: int, cached: CachedLayer) -> Tensor:
    skip = sinks_of(layer.start)
    keys, values = layer.keys[:, skip:].float().cpu(), layer.values[:, skip:].float().cpu()
    if keys.shape[1] == 0:
        return torch.zeros(0, dtype=torch.int16)
    turn = cached.ahead(layer.start + layer.keys.shape[1], FUTURE)
    return extra_steps(keys, values, profile.queries[index], turn, cached.logit_scale)


def sinks_of(start: int) -> int:
    return max(SINKS - start, 0)


def _framed(layer: LayerSource, cached: CachedLayer) -> tuple[Tensor, Tensor]:
    """What is coded: keys without RoPE and values, without sinks."""
    skip = sinks_of(layer.start)
    return cached.enter(layer.keys[:, skip:], layer.start + skip), layer.values[:, skip:]


def _step_for(
    bits: float,
    profile: StoreProfile,
    framed: list[tuple[Tensor, Tensor]],
    extra: list[Tensor],
) -> int:
    """The step that takes `bits` of this text: the profile's rates, corrected by a sample."""
    step = profile.step_for(bits, torch.cat(extra))
    for _ in range(3):
        nbytes = elements = 0
        some = []
        for index, (keys, values) in enumerate(framed):
            first = max(keys.shape[1] - PAGE, 0) // 2
            part = slice(first, first + PAGE)
            sample = keys[:, part], values[:, part]
            some.append(extra[index][part])
            pages = LayerCode(profile, index, step).encode(*sample, some[-1])
            nbytes += sum(map(len, pages))
            elements += sum(x.numel() for x in sample)
        expected, taken = profile.rate(step, torch.cat(some)), 8 * nbytes / max(elements, 1)
        if taken <= 0 or expected <= 0:
            break
        better = profile.step_for(bits * expected / taken, torch.cat(extra))
        if better == step:
            break
        step = better
    return step


def _first(layer: LayerSource, extra: Tensor) -> bytes:
    """What is not in pages: sinks and extra steps."""
    skip = sinks_of(layer.start)
    dtype = torch.float16 if layer.keys.dtype == torch.float32 else layer.keys.dtype
    sinks = [narrowed(x[:, :skip], dtype).contiguous().cpu() for x in (layer.keys, layer.values)]
    if sinks[0].dtype != sinks[1].dtype:
        sinks = [x.float() for x in sinks]
    name = str(sinks[0].dtype).removeprefix("torch.")
    packed = (
        need("zstandard")
        .ZstdCompressor(level=19)
        .compress((extra // UNIT - FINER).to(torch.uint8).numpy().tobytes())
    )
    raw = [x.flatten().view(torch.uint8).numpy().tobytes() for x in sinks]
    return bytes([list(DTYPES).index(name)]) + b"".join(raw) + packed
