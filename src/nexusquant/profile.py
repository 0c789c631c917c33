"""Profiles: what is known about a model's keys and values, shared by all of its sequences.

A profile holds a transform per layer, KV head and side (keys or values), and what noise there does
to the attention output. Row layouts follow from it for every budget. Built by
`nexusquant.statistics`, kept by `nexusquant.profile_store`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nexusquant.allocation import allocate
from nexusquant.layout import RowLayout

SIDES = ("key", "value")


@dataclass(frozen=True)
class Side:
    """The keys or the values of one layer.

    Attributes:
        forward: (kv_heads, dim, dim) fp32, centred vector to code space, where every 8-group has
            unit variance; groups are ordered by falling variance before that scaling.
        inverse: its inverse.
        mean: (kv_heads, dim) fp32.
        variance: (kv_heads, dim / 8) fp32, of the groups before scaling, in the unit of noise that
            the transform makes equal in all directions: logits for keys, the norm of the attention
            output for values.
        weight: (kv_heads,) fp32, squared relative error of the residual stream per unit of noise.
        coherence: (kv_heads, dim / 8) fp32, at least 1: damage of leaving a group uncoded in all
            tokens over that of independent noise as large.
    """

    forward: Tensor
    inverse: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor
    coherence: Tensor

    def to(self, device: torch.device | str) -> Side:
        """On another device."""
        return Side(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class LayerProfile:
    """Keys and values of one layer.

    Attributes:
        inverse_residual: mean of 1 / squared norm of the residual stream there, 1 if unknown.
        rank_costs: (kv_heads, RANKS + 1) of keys and of values, damage per unit of noise on a
            token by the rank of its score, and on a recent one (`nexusquant.rank_costs`); None if
            unknown.
    """

    key: Side
    value: Side
    inverse_residual: float = 1.0
    rank_costs: tuple[Tensor, Tensor] | None = None

    def costs(self, shared: Shared, budget: Budget) -> tuple[Tensor, Tensor]:
        """(tiers, kv_heads, groups, 2) of keys and of values, as in `allocate`: damage per squared
        error. Without costs by rank, all heads weigh alike.
        """
        if self.rank_costs is None:
            every = torch.tensor(budget.factors)[:, None].expand(-1, len(self.key.weight))
            key, value = shared.key * every, shared.value * self.inverse_residual * every
        else:
            key, value = (budget.tier_costs(x) for x in self.rank_costs)
        return _costs(key, self.key), _costs(VALUE_SHARE * value, self.value)

    def weights(self, shared: Shared) -> tuple[Tensor, Tensor]:
        """(kv_heads,) of keys and of values, for storage: damage per unit of noise.

        The measured weight of a head is a noisy, prompt-dependent estimate, so it is averaged
        geometrically with what a head of unknown behaviour would get (`Shared`).
        """
        key = (self.key.weight * shared.key).sqrt()
        value = (self.value.weight * self.inverse_residual * shared.value).sqrt() * VALUE_SHARE
        return key, value


def _costs(weight: Tensor, side: Side) -> Tensor:
    """weight (tiers, kv_heads)."""
    apart = weight[..., None] * side.variance
    return torch.stack([apart, apart * (side.coherence - 1)], -1)


VALUE_SHARE = 0.6
"""Factor on the cost of values, from measured KL: error in keys also adds up along a generation."""


@dataclass(frozen=True)
class Shared:
    """Geometric means over all heads of a model: the weight of a head one knows nothing about."""

    key: float
    value: float

    @staticmethod
    def of(layers: list[LayerProfile]) -> Shared:
        """From the layers that are known."""
        key = torch.cat([layer.key.weight for layer in layers])
        value = torch.cat([layer.value.weight / layer.inverse_residual for layer in layers])
        floors = [x.max().clamp(min=1e-30) * 1e-6 for x in (key, value)]  # one idle head is no zero
        both = zip((key, value), floors, strict=True)
        return Shared(*(float(x.clamp(min=floor).log().mean().exp()) for x, floor in both))


Layouts = tuple[RowLayout, RowLayout]
"""Of keys and of values."""


@dataclass(frozen=True)
class Budget:
    """Bits to distribute over groups, heads, layers, sides and tiers.

    Attributes:
        key_bits, value_bits: mean bits per element.
        joint: keys and values draw on one budget; False keeps their means apart.
        shares: fraction of the tokens in each tier.
        factors: cost of a tier's tokens relative to the others, where that is not known by rank.
        kept: fraction of all tokens that are not evicted: those of the highest ranks.
        ranked: tiers are by the scores that costs by rank are about, head by head.
        recent: the tokens are recent ones, whatever their rank.
    """

    key_bits: float
    value_bits: float
    joint: bool
    shares: tuple[float, ...]
    factors: tuple[float, ...]
    kept: float = 1.0
    ranked: bool = True
    recent: bool = False

    def tier_costs(self, costs: Tensor) -> Tensor:
        """(heads, RANKS + 1) to the mean cost of every tier's tokens, (tiers, heads)."""
        if self.recent:
            return costs[:, -1].double().expand(len(self.shares), -1)
        by_rank = costs[:, :-1]
        below = torch.nn.functional.pad(by_rank.double().cumsum(-1), (1, 0))
        ends = torch.tensor((0.0, *self.shares), dtype=torch.float64).cumsum(0)
        ends = ends * (self.kept if self.ranked else 1.0) * by_rank.shape[-1]
        whole = ends.long().clamp(max=by_rank.shape[-1] - 1)
        sums = below[:, whole] + (ends - whole) * by_rank.double()[:, whole]
        of_tiers = (sums.diff() / ends.diff()).mT
        if self.ranked:
            return of_tiers
        factors, shares = (torch.tensor(x).double() for x in (self.factors, self.shares))
        mean = (shares[:, None] * of_tiers).sum(0)
        return factors[:, None] * mean / (factors * shares).sum()

    def split(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Costs of all groups, (tiers, n, 2) each, to rates (tiers, n)."""
        shares = torch.tensor(self.shares)
        if not self.joint:
            return allocate(keys, shares, self.key_bits), allocate(values, shares, self.value_bits)
        many, more = keys.shape[1], values.shape[1]
        bits = (self.key_bits * many + self.value_bits * more) / (many + more)
        rates = allocate(torch.cat([keys, values], 1), shares, bits)
        return rates[:, :many], rates[:, many:]

    def layouts(self, costs: list[tuple[Tensor, Tensor]]) -> list[list[Layouts]]:
        """[layer][tier] -> layouts of keys and values, all layers from one budget.

        Args:
            costs: per layer, (tiers, heads, groups, 2) of keys and of values. Layers may differ in
                heads and groups.
        """
        columns = [[side[i].flatten(1, 2) for side in costs] for i in (0, 1)]
        both = self.split(*(torch.cat(column, 1) for column in columns))
        per_side = [
            [
                [RowLayout(_tuples(tier)) for tier in piece.unflatten(-1, side[i].shape[1:3])]
                for piece, side in zip(
                    rates.split([x.shape[1] for x in columns[i]], -1), costs, strict=True
                )
            ]
            for i, rates in enumerate(both)
        ]
        return [list(zip(*layer, strict=True)) for layer in zip(*per_side, strict=True)]


def _tuples(rates: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(head) for head in rates.tolist())


@dataclass(eq=False)
class Profile:
    """The profile of a model: layers by index, and where they come from.

    Attributes:
        fingerprint: of the model's config and weights (`nexusquant.hf.fingerprint`).
        rope_page: page of the key frame that the statistics were taken in.
        source: what text it was built from, for people.
        tokens: how many.
    """

    fingerprint: str
    rope_page: int
    source: str
    tokens: int
    layers: dict[int, LayerProfile] = field(default_factory=dict)
    complete: bool = False
    _layouts: dict[Budget, dict[int, list[Layouts]]] = field(default_factory=dict)
    _devices: dict[tuple[int, str, torch.device], Side] = field(default_factory=dict)

    def side(self, layer: int, side: str, device: torch.device) -> Side:
        """One layer's keys or values on a device."""
        found: Side = getattr(self.layers[layer], side)
        if found.forward.device == device:
            return found
        key = layer, side, device
        if key not in self._devices:
            self._devices[key] = found.to(device)
        return self._devices[key]

    def alone(self) -> Profile:
        """The same, but every layer has its own budget, as while the profile is being built."""
        return replace(self, complete=False, _layouts={})

    def layouts(self, layer: int, budget: Budget) -> list[Layouts]:
        """Row layouts of a layer's keys and values, per tier.

        One budget for all layers once the profile is complete; while it is being built, each layer
        has its own.
        """
        if not self.complete:
            one = self.layers[layer]
            return budget.layouts([one.costs(Shared.of([one]), budget)])[0]
        if budget not in self._layouts:
            known = list(self.layers.values())
            shared = Shared.of(known)
            every = budget.layouts([one.costs(shared, budget) for one in known])
            self._layouts[budget] = dict(zip(self.layers, every, strict=True))
        return self._layouts[budget][layer]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors: list[Tensor] = []
        for layer in self.layers.values():
            for side in SIDES:
                tensors += vars(getattr(layer, side)).values()
            tensors += layer.rank_costs or ()
        return sum(x.nbytes for x in tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Profile:
        return self  # shared by design
