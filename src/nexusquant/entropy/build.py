"""Storage profiles from samples of keys and values, and from what error in them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexusquant.entropy.classes import CLASSES, UNKNOWN, Classes, Ints, parts
from nexusquant.entropy.layer import LayerCode
from nexusquant.entropy.profile import (
    COARSEST,
    FINEST,
    LEVELS,
    OCTAVE,
    QueryMoments,
    StoreProfile,
    StoreSide,
)
from nexusquant.entropy.symbols import REACH, SYMBOLS, Tables
from nexusquant.errors import ProfileError
from nexusquant.math.e8 import GROUP
from nexusquant.profile import SIDES, LayerProfile, Shared

RIDGE = 1e-3
"""Share of the mean variance added in all directions: no text shows all that will be seen."""
FLOOR = 1e-5
"""The same that every coordinate has at least: what has none is shrunk away at any rate."""
_MAX_DECAY = 0.98
_TOTAL = 65000  # of the counts of a table, about
_PRIOR = 64.0
"""Weight, in symbols, of a Laplacian in the frequencies: few samples do not rule anything out."""
_COUNTED = range(-9 * OCTAVE, -4 * OCTAVE, OCTAVE)
"""Step numbers that symbols are counted at: they meet all classes."""
_COUNTED_TOKENS = 2048  # of a layer: each has a hundred numbers or more at every step


@dataclass(frozen=True)
class Sample:
    """Consecutive tokens of one text, one layer: (kv_heads, tokens, dim), keys without RoPE."""

    key: Tensor
    value: Tensor


def build_profile(
    layers: dict[int, LayerProfile],
    samples: dict[int, list[Sample]],
    queries: dict[int, QueryMoments],
    fingerprint: str,
    source: str,
    tokens: int,
    report: Callable[[str], None] = lambda step: None,
) -> StoreProfile:
    """The storage profile of a model.

    Args:
        layers: per layer, the transforms of its heads in the frame without RoPE, and the weight of
            noise in them.
        samples: per layer, of all texts.
        queries: per layer.

    Raises:
        ProfileError: nothing to build it from.
    """
    if not layers:
        raise ProfileError("no layer of this model can be compressed: there is nothing to profile.")
    shared = Shared.of(list(layers.values()))
    sides, shapes = {}, {}
    for index, layer in layers.items():
        report(f"layer {index}")
        weights = layer.weights(shared)
        key, value = (
            _side(layer, name, weight, [getattr(s, name) for s in samples[index]])
            for name, weight in zip(SIDES, weights, strict=True)
        )
        sides[index] = key, value
        shapes[index] = (*layer.key.mean.shape, layer.value.mean.shape[1])
    draft = StoreProfile(
        fingerprint, source, tokens, shapes, sides, queries, _laplacian(),
        torch.zeros((COARSEST - FINEST) // OCTAVE + 1),
    )  # fmt: skip
    report("symbol frequencies")
    counted = replace(draft, tables=_counted(draft, samples))
    return replace(counted, rates=_rates(counted))


def _side(layer: LayerProfile, name: str, weight: Tensor, samples: list[Tensor]) -> StoreSide:
    """One transform over all heads, from the transforms of each."""
    side = getattr(layer, name)
    least = side.variance.amax(-1, keepdim=True).clamp(min=1e-20) * 1e-9
    deviation = side.variance.clamp(min=least).sqrt().repeat_interleave(GROUP, -1)
    heads = (side.forward * deviation[..., None]).double() * weight.double().sqrt()[:, None, None]
    block = torch.block_diag(*heads)
    centred = [
        x.transpose(0, 1).flatten(1).double() - side.mean.double().flatten() for x in samples
    ]
    mean = side.mean.flatten() + torch.cat(centred).mean(0).float()
    shift = torch.cat(centred).mean(0)
    y = [(x - shift) @ block.mT for x in centred]
    covariance = sum(x.mT @ x for x in y) / sum(map(len, y))
    ridge = RIDGE * covariance.diagonal().mean()
    variance, basis = torch.linalg.eigh(covariance + ridge * torch.eye(len(block)))
    basis = basis.flip(-1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    forward = basis.mT @ block
    scale = forward.abs().max() / 1024  # within fp16, far from its ends
    y = [x @ basis for x in y]
    variance = sum((x * x).sum(0) for x in y) / sum(map(len, y))
    lagged = sum((x[1:] * x[:-1]).sum(0) for x in y) / sum(len(x) - 1 for x in y)
    floor = FLOOR * variance.mean()
    decay = (lagged / variance.clamp(min=floor)).clamp(0, _MAX_DECAY)
    left = torch.stack([variance, variance * (1 - decay.square())]).clamp(min=floor)
    return StoreSide(
        (forward / scale).half(), scale.float(), mean, decay.half(),
        _level(left), _level(left.unflatten(-1, (-1, GROUP)).mean(-1)),
    )  # fmt: skip


def _level(variance: Tensor) -> Tensor:
    return (OCTAVE / 2 * variance.clamp(min=1e-30).log2()).round().clamp(max=LEVELS).short()


def _laplacian() -> Tables:
    """What symbols of a class would be if coordinates were Laplacian."""
    n = np.arange(-REACH, REACH + 1)
    values = np.empty((2, CLASSES, 2, SYMBOLS))
    cosets = np.empty((2, CLASSES, 2))
    for cls in range(CLASSES):
        deviation = 2.0 ** ((cls - CLASSES + 7) / 3)
        for coset in (0, 1):
            share = np.exp(-np.sqrt(2) * np.abs(n + coset / 2) / deviation)
            share[-1] = 2e-5 * share.sum()
            values[:, cls, coset] = share / share.sum()
        cosets[:, cls] = (1 - 0.5 * min(1.0, deviation), 0.5 * min(1.0, deviation))
    return Tables(_integers(values), _integers(cosets))


def _integers(shares: NDArray[Any]) -> NDArray[Any]:
    """Counts of at least 1 that add up to less than 2^16."""
    share = shares / shares.sum(-1, keepdims=True)
    return np.maximum(np.floor(share * _TOTAL), 1).astype(np.uint16)


def _counted(draft: StoreProfile, samples: dict[int, list[Sample]]) -> Tables:
    """Frequencies of symbols in the samples."""
    values = draft.tables.values.astype(np.float64) / _TOTAL * _PRIOR
    cosets = draft.tables.cosets.astype(np.float64) / _TOTAL * _PRIOR
    for index in draft.layers:
        for key, value in _some(samples[index]):
            for step in _COUNTED:
                for n, coset, classes in LayerCode(draft, index, step).points(key, value):
                    _count(n, coset, classes, values, cosets)
    return Tables(_integers(values), _integers(cosets))


def _some(samples: list[Sample]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values from the middle of all texts, `_COUNTED_TOKENS` at most."""
    count = max(_COUNTED_TOKENS // len(samples), 1)
    for sample in samples:
        start = max(sample.key.shape[1] - count, 0) // 2
        yield sample.key[:, start : start + count], sample.value[:, start : start + count]


def _count(
    n: Ints, coset: Ints, classes: Classes, values: NDArray[Any], cosets: NDArray[Any]
) -> None:
    """Add a page's symbols."""
    model = classes.number_keys(coset, np.full_like(coset, UNKNOWN), 0, GROUP).astype(np.int64) // 3
    symbol = np.minimum((n.reshape(-1) + REACH).view(np.uint32), 2 * REACH)
    at = (model * SYMBOLS + symbol)[model < values.size // SYMBOLS]  # no bits dropped
    values += np.bincount(at, minlength=values.size).reshape(values.shape)
    at = (classes.coset_keys().astype(np.int64) * 2 + coset).ravel()
    cosets += np.bincount(at, minlength=cosets.size).reshape(cosets.shape)


def _rates(profile: StoreProfile) -> Tensor:
    """Bits per element that steps take of what is distributed as the tables say."""
    one = _entropy(profile.tables.cosets)
    share = profile.tables.cosets / profile.tables.cosets.sum(-1, keepdims=True)
    halves = [profile.tables.values[..., parity:-1:2] for parity in (0, 1)]
    free = (_entropy(profile.tables.values) * share).sum(-1)
    told = (sum(_entropy(half) for half in halves) / 2 * share).sum(-1)
    elements = sum(len(side.mean) for layer in profile.layers.values() for side in layer)
    rates = []
    for step in range(FINEST, COARSEST + 1, OCTAVE):
        bits = 0.0
        for index in profile.layers:
            page = LayerCode(profile, index, step).classes(torch.zeros(2, dtype=torch.int16))
            bits += float(one.reshape(-1)[page.coset_keys()[1]].sum())
            none = np.zeros(page.shape, np.int32)
            keys = page.number_keys(none, none + UNKNOWN, 0, GROUP).reshape(2, -1, GROUP)[1]
            of = parts(keys.astype(np.int32))
            each = free[of.side, of.cls] + of.drop
            known = np.where(of.drop == 0, told[of.side, of.cls], each - 1)
            bits += float(each[:, 1:].sum() + known[:, 0].sum())
        rates.append(bits / elements)
    return torch.tensor(rates).cummin(0).values


def _entropy(counts: NDArray[Any]) -> NDArray[np.float64]:
    share = counts / counts.sum(-1, keepdims=True)
    return np.asarray(-(share * np.log2(share)).sum(-1))
