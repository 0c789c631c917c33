"""Entropy-coded streams to the keys and values that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.entropy.importance import COARSER, FINER, UNIT
from nexusquant.entropy.layer import PAGE, LayerCode
from nexusquant.entropy.profile import COARSEST, FINEST, StoreProfile
from nexusquant.errors import FormatError, ProfileError
from nexusquant.extras import need
from nexusquant.nxq import Reader
from nexusquant.prefix.coded import (
    DTYPES,
    MOST_HIDDEN,
    SINKS,
    VERSION,
    Report,
    check_shapes,
    hidden,
    sinks_of,
)
from nexusquant.prefix.rotary import CachedLayer, cached_layers
from nexusquant.prefix.source import LayerSource

MOST = 512
"""Elements per byte that a file may claim to hold: ten times what real ones do."""


@dataclass(frozen=True)
class Decoded:
    """A prefix as it was, in the dtype and on the devices that the model's caches have."""

    layers: list[LayerSource]
    tokens: int


def decode_prefix(
    reader: Reader, model: nn.Module, profile: StoreProfile, report: Report
) -> Decoded:
    """The layers of a file whose `meta` says codec "entropy".

    Raises:
        FormatError: damaged, or not what the header says.
        ProfileError: the profile is not the one that it was coded with.
        UnsupportedError: a model with layers that are no plain attention.
    """
    return decode_layers(reader, cached_layers(model), profile, report)


def decode_layers(
    reader: Reader, cached: dict[int, CachedLayer], profile: StoreProfile, report: Report
) -> Decoded:
    """`decode_prefix` for a model with these layers."""
    meta = _checked(reader, cached, profile)
    layers = []
    for index, start in enumerate(meta["starts"]):
        report(f"layer {index + 1} of {len(cached)}")
        code = LayerCode(profile, index, meta["step"])
        layers.append(_decode(reader, code, cached[index], start, meta["tokens"]))
    return Decoded(layers, meta["tokens"])


def _checked(
    reader: Reader, cached: dict[int, CachedLayer], profile: StoreProfile
) -> dict[str, Any]:
    """The header's fields, which must be possible ones."""
    meta = reader.meta
    if type(meta.get("version")) is not int or meta["version"] != VERSION:
        raise FormatError(
            f"version {meta.get('version')!r:.80} of the codec, this nexusquant reads {VERSION}:"
            " upgrade nexusquant, or save the prefix again."
        )
    kinds = {"tokens": int, "step": int, "page": int, "starts": list, "profile": str}
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            raise FormatError(f"the header's {name} is {meta.get(name)!r:.80}, no {kind.__name__}.")
    if meta["profile"] != profile.digest:
        raise ProfileError(
            f"this prefix was coded with storage profile {meta['profile']!r:.80}, not with"
            f" {profile.digest}."
        )
    check_shapes(profile, cached)
    starts, tokens = meta["starts"], meta["tokens"]
    if len(starts) != len(cached) or not all(
        type(x) is int and 0 <= x <= hidden(cached[i], tokens) and x < tokens
        for i, x in enumerate(starts)
    ):
        raise FormatError("the header's starts do not fit its tokens, or the model's layers.")
    if meta["page"] != PAGE or not FINEST <= meta["step"] <= COARSEST or min(starts) > MOST_HIDDEN:
        raise FormatError(
            f"page {meta['page']}, step {meta['step']} or first start {min(starts)} out of range."
        )
    for index, start in enumerate(starts):
        pages = -(-max(tokens - start - sinks_of(start), 0) // PAGE)
        name = f"layer.{index}"
        if reader.streams.get(name) != pages + 1:
            raise FormatError(f"{name} has not the {pages + 1} chunks that its tokens take.")
        heads, key, value = profile.shapes[index]
        elements = heads * (key + value) * (tokens - start)
        if elements > MOST * (reader.size(name) + SINKS):
            raise FormatError(f"{name} claims {elements} elements in {reader.size(name)} bytes.")
    return meta


def _decode(
    reader: Reader, code: LayerCode, cached: CachedLayer, start: int, tokens: int
) -> LayerSource:
    name = f"layer.{code.layer}"
    heads, *dims = cached.shape
    skip = min(sinks_of(start), tokens - start)
    coded = tokens - start - skip
    first, *pages = reader.read_range(name, 0, reader.streams[name])
    (keys, values), extra = _split_first(bytes(first), heads, dims, skip, coded, name)
    if pages:
        counts = [min(PAGE, coded - i * PAGE) for i in range(len(pages))]
        framed, more = code.decode(list(pages), counts, extra)
        keys = torch.cat([keys, cached.leave(framed, start + skip)], 1)
        values = torch.cat([values, more], 1)
    most = torch.finfo(cached.dtype).max  # rounding errors of numbers close to it
    keys, values = (x.clamp(-most, most).to(cached.device, cached.dtype) for x in (keys, values))
    return LayerSource(keys, values, start)


def _split_first(
    data: bytes, heads: int, dims: list[int], skip: int, coded: int, name: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sinks and extra steps."""
    if not data or data[0] >= len(DTYPES):
        raise FormatError(f"{name}: its first chunk has no dtype that is known.")
    dtype = list(DTYPES.values())[data[0]]
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
        steps = zstandard.ZstdDecompressor().decompress(
            data[at:], max_output_size=coded, allow_extra_data=False
        )
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
