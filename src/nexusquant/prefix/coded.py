"""Prefixes as entropy-coded streams, and back (docs/FORMAT.md, codec "entropy")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.entropy.importance import COARSER, FINER, UNIT, extra_steps
from nexusquant.entropy.layer import PAGE, LayerCode
from nexusquant.entropy.profile import COARSEST, FINEST, StoreProfile
from nexusquant.errors import FormatError, ProfileError
from nexusquant.extras import need
from nexusquant.nxq import Reader
from nexusquant.prefix.rotary import CachedLayer, cached_layers
from nexusquant.prefix.source import LayerSource
from nexusquant.tokens import narrowed

NAME = "entropy"
SINKS = 4
"""First tokens, which are outliers and stored as they are."""
FUTURE = 512
"""Positions that queries are expected at: those that follow."""
MOST = 512
"""Elements per byte that a file may claim to hold: ten times what real ones do."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Report = Callable[[str], None]


@dataclass(frozen=True)
class Decoded:
    """A prefix as it was, in the dtype and on the devices that the model's caches have."""

    layers: list[LayerSource]
    tokens: int


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
    if missing := [i for i in range(len(layers)) if i not in profile.layers]:
        raise ProfileError(
            f"the storage profile does not know layers {missing}: codec='raw' saves them as they"
            " are in a compressed cache."
        )
    _check_shapes(profile, cached)
    if len(layers) != len(cached) or any(
        (x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) != cached[i].shape
        or x.start > _hidden(cached[i], tokens)
        for i, x in enumerate(layers)
    ):
        raise UnsupportedError("this cache has not the layers that the model makes: is it another's?")
    if min(x.start for x in layers) > MOST_HIDDEN:
        raise UnsupportedError(f"all layers begin behind {MOST_HIDDEN} tokens: too far to save.")
    report("expected attention")
    extra = [_extra(x, profile, i, cached[i]) for i, x in enumerate(layers)]
    step = profile.step_for(bits, torch.cat(extra))
    streams = {}
    for index, layer in enumerate(layers):
        report(f"layer {index + 1} of {len(layers)}")
        streams[f"layer.{index}"] = _encode(
            layer, LayerCode(profile, index, step), cached[index], extra[index]
        )
    dtype = str(layers[0].keys.dtype).removeprefix("torch.")
    meta = {
        "codec": NAME,
        "dtype": dtype,
        "page": PAGE,
        "profile": profile.digest,
        "starts": [layer.start for layer in layers],
        "step": step,
        "tokens": tokens,
    }
    return meta, streams


def _check_shapes(profile: StoreProfile, cached: dict[int, CachedLayer]) -> None:
    if profile.shapes != {index: layer.shape for index, layer in cached.items()}:
        raise ProfileError(
            "the storage profile has other layers than this model, or of other shapes."
        )


def _hidden(layer: CachedLayer, tokens: int) -> int:
    """How many of the first tokens no later query of this layer sees."""
    return 0 if layer.window is None else max(tokens - layer.window + 1, 0)


def _extra(layer: LayerSource, profile: StoreProfile, index: int, cached: CachedLayer) -> Tensor:
    skip = _sinks(layer.start)
    keys, values = layer.keys[:, skip:].float().cpu(), layer.values[:, skip:].float().cpu()
    if keys.shape[1] == 0:
        return torch.zeros(0, dtype=torch.int16)
    turn = cached.ahead(layer.start + layer.keys.shape[1], FUTURE)
    scaling = keys.shape[-1] ** -0.5 if cached.scaling is None else cached.scaling
    return extra_steps(keys, values, profile.queries[index], turn, scaling)


def _sinks(start: int) -> int:
    return max(SINKS - start, 0)


def _framed(layer: LayerSource, rotary: LayerRotary) -> tuple[Tensor, Tensor]:
    """What is coded: keys without RoPE and values, without sinks."""
    skip = _sinks(layer.start)
    slots = torch.arange(layer.start + skip, layer.start + layer.keys.shape[1])
    return rotary.enter(layer.keys[:, skip:], slots), layer.values[:, skip:]


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
    skip = _sinks(layer.start)
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
    return bytes([list(_DTYPES).index(name)]) + b"".join(raw) + packed


def decode_prefix(
    reader: Reader, model: nn.Module, profile: StoreProfile, report: Report
) -> Decoded:
    """The layers of a file whose `meta` says codec "entropy".

    Raises:
        FormatError: damaged, or not what the header says.
        ProfileError: the profile is not the one that it was coded with.
    """
    meta = _checked(reader, profile)
    tokens, starts = meta["tokens"], meta["starts"]
    rotary = rotary_of(model, tokens)
    layers = []
    for index, start in enumerate(starts):
        report(f"layer {index + 1} of {len(starts)}")
        code = LayerCode(profile, index, meta["step"])
        layers.append(_decode(reader, f"layer.{index}", code, rotary[index], start, tokens))
    return Decoded(layers, tokens)


def _checked(reader: Reader, profile: StoreProfile) -> dict[str, Any]:
    """The header's fields, which must be possible ones."""
    meta = reader.meta
    kinds = {"tokens": int, "step": int, "page": int, "starts": list, "profile": str}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind) or isinstance(meta[name], bool):
            raise FormatError(f"the header's {name} is {meta.get(name)!r}, not of {kind.__name__}.")
    if meta["profile"] != profile.digest:
        raise ProfileError(
            f"this prefix was coded with storage profile {meta['profile']}, the one given or found"
            f" is {profile.digest}: give the right one, or embed it when saving."
        )
    starts, tokens = meta["starts"], meta["tokens"]
    if len(starts) != len(profile.layers) or not all(
        isinstance(x, int) and 0 <= x < tokens for x in starts
    ):
        raise FormatError("the header's starts do not fit its tokens, or the model's layers.")
    if meta["page"] != PAGE or not FINEST <= meta["step"] <= COARSEST:
        raise FormatError(f"page {meta['page']} or step {meta['step']} out of range.")
    for index, start in enumerate(starts):
        pages = -(-max(tokens - start - _sinks(start), 0) // PAGE)
        name = f"layer.{index}"
        if reader.streams.get(name) != pages + 1:
            raise FormatError(f"{name} has not the {pages + 1} chunks that its tokens take.")
        heads, key, value = profile.shapes[index]
        elements = heads * (key + value) * (tokens - start)
        if elements > MOST * (reader.size(name) + SINKS):
            raise FormatError(f"{name} claims {elements} elements in {reader.size(name)} bytes.")
    return meta


def _decode(
    reader: Reader, name: str, code: LayerCode, rotary: LayerRotary, start: int, tokens: int
) -> LayerSource:
    heads, *dims = code.profile.shapes[code.layer]
    skip = min(_sinks(start), tokens - start)
    coded = tokens - start - skip
    exact, extra = _split_first(bytes(reader.read(name, 0)), heads, dims, skip, coded, name)
    pages = reader.read_range(name, 1, reader.streams[name])
    counts = [min(PAGE, coded - i * PAGE) for i in range(len(pages))]
    slots = torch.arange(start + skip, tokens)
    keys, values = exact
    if pages:
        framed, more = code.decode(list(pages), counts, extra)
        keys = torch.cat([keys, rotary.leave(framed, slots)], 1)
        values = torch.cat([values, more], 1)
    keys, values = (x.to(rotary.device, rotary.dtype) for x in (keys, values))
    return LayerSource(keys, values, start)


def _split_first(
    data: bytes, heads: int, dims: list[int], skip: int, coded: int, name: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sinks and extra steps."""
    if not data or data[0] >= len(_DTYPES):
        raise FormatError(f"{name}: its first chunk has no dtype that is known.")
    dtype = list(_DTYPES.values())[data[0]]
    at, found = 1, []
    for dim in dims:
        size = heads * skip * dim * dtype.itemsize
        part = bytearray(data[at : at + size])
        if len(part) != size:
            raise FormatError(f"{name}: its first chunk ends within the first tokens.")
        x = torch.frombuffer(part, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
        found.append(x.view(heads, skip, dim).float())
        at += size
    if not all(bool(torch.isfinite(x).all()) for x in found):
        raise FormatError(f"{name}: NaN or infinity among the first tokens.")
    zstandard = need("zstandard")
    try:
        if zstandard.frame_content_size(data[at:]) != coded:
            raise FormatError(f"{name}: steps of another number of tokens than it has.")
        steps = zstandard.ZstdDecompressor().decompress(data[at:], max_output_size=coded)
    except zstandard.ZstdError as error:
        raise FormatError(f"{name}: steps that cannot be read ({error}).") from error
    extra = (
        torch.frombuffer(bytearray(steps), dtype=torch.uint8).short()
        if coded
        else torch.zeros(0, dtype=torch.int16)
    )
    if len(extra) != coded or (coded and int(extra.max()) > COARSER - FINER):
        raise FormatError(f"{name}: steps out of range.")
    return (found[0], found[1]), (extra + FINER) * UNIT
