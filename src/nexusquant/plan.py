"""How one layer of one sequence will be coded: bases, centres and row layouts, decided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexusquant.allocation import uniform_costs
from nexusquant.config import MAX_BITS, CompressionConfig
from nexusquant.errors import NonFiniteError, ProfileError
from nexusquant.math.e8 import GROUP
from nexusquant.math.gains import LIMIT
from nexusquant.profile import SIDES, Budget, Layouts, Profile
from nexusquant.quantizer import Basis, Centre, Orthonormal, Profiled, Quantizer
from nexusquant.tokens import CodedTokens

_HUGE = 100  # times the median squared size: such vectors do not set the scale of the others
_ORDINARY = 16  # times the median size: such vectors must be within reach of the code
_REACH = LIMIT / 2  # times the scale
_SAMPLE = 2048
"""Tokens that centres are computed from, at most."""
_OWN_CENTRE = 256
"""Tokens from which on a sequence's own mean is worth its bytes; a profile has one otherwise."""


@dataclass(frozen=True)
class Coding:
    """Quantizers of keys and values per tier, and the centres that all tiers share."""

    centres: tuple[Centre, Centre]
    tiers: list[tuple[Quantizer, Quantizer]]

    @staticmethod
    def of(parts: list[CodedTokens]) -> Coding:
        """How a past was coded last: each tier has one part that holds all heads."""
        last = parts[-1]
        tiers = [part for part in parts if part.heads is None and part.shares_centres(last)]
        return Coding(
            (last.key_centre, last.value_centre),
            [(part.key_quantizer, part.value_quantizer) for part in tiers],
        )

    @property
    def unscored(self) -> int:
        """The tier of tokens that nobody knows the importance of: the middle one."""
        return len(self.tiers) // 2

    def unscored_members(self, entries: Tensor) -> list[Tensor]:
        """Per tier which entries (..., n) are in it: all in that one."""
        nothing = entries[..., :0]
        return [entries if i == self.unscored else nothing for i in range(len(self.tiers))]


def plan_coding(
    config: CompressionConfig,
    keys: Tensor,
    values: Tensor,
    empty: Tensor,
    profile: Profile | None,
    layer: int,
    all_alike: bool = False,
) -> Coding:
    """For the first tokens of a layer: keys (in their frame) and values, (batch, heads, n, dim).

    Args:
        empty: (batch, heads or 1, n, 1) bool, entries that hold nothing.
        all_alike: most vectors are so much alike that their spread does not reach the others.
        profile: used if the config wants one and it knows this layer.

    Raises:
        UnsupportedError: a head_dim that is not a multiple of 8.
        NonFiniteError: NaN or infinity.
        ProfileError: a profile of other shapes.
    """
    known = profile is not None and layer in profile.layers and config.transform == "klt"
    sides = (keys, values)
    if known and profile is not None:
        _check_shapes(profile, layer, sides)
        bases: list[Basis] = [Profiled(profile, layer, side) for side in ("key", "value")]
        centres = [
            _profiled_centre(x, empty, basis, all_alike)
            for x, basis in zip(sides, bases, strict=True)
        ]
    else:
        name = "hadamard" if config.transform == "klt" else config.transform
        bases = [Orthonormal(name, x.shape[-1]) for x in sides]
        least = int(config.least_scored * (1 - config.evict_ratio)) - config.sinks
        centres = [_own_centre(x, empty, max(least, 1)) for x in sides]
    shapes = [(x.shape[1], x.shape[-1]) for x in sides]
    layouts = _layouts(config, bases, shapes, config.tier_shares, config.tier_factors)
    key, value = (
        [Quantizer(pair[i], bases[i], config.levels, config.overload) for pair in layouts]
        for i in (0, 1)
    )
    return Coding((centres[0], centres[1]), list(zip(key, value, strict=True)))


def with_profile(config: CompressionConfig, coding: Coding, profile: Profile | None) -> Coding:
    """The same code space, where `profile` has it, and row layouts as `config` says."""
    key, value = coding.tiers[0]
    shapes = [(x.layout.heads, GROUP * x.layout.groups) for x in (key, value)]
    bases = [
        Profiled(profile, x.basis.layer, x.basis.side)
        if profile is not None and isinstance(x.basis, Profiled)
        else x.basis
        for x in (key, value)
    ]
    layouts = _layouts(config, bases, shapes, config.tier_shares, config.tier_factors)
    return Coding(
        coding.centres,
        [
            (
                replace(key, layout=pair[0], basis=bases[0]),
                replace(value, layout=pair[1], basis=bases[1]),
            )
            for pair in layouts
        ],
    )


def fresh_quantizers(config: CompressionConfig, coding: Coding) -> tuple[Quantizer, Quantizer]:
    """For tokens that stay fresh, in the code space of others; never at fewer bits than those."""
    final = coding.tiers[coding.unscored]
    shapes = [(x.layout.heads, GROUP * x.layout.groups) for x in final]
    finer = config.replace(
        **{f"{side}_bits": min(getattr(config, f"{side}_bits") + config.fresh_bits, MAX_BITS)
           for side in SIDES}
    )  # fmt: skip
    bases = [x.basis for x in final]
    layouts = _layouts(finer, bases, shapes, (1.0,), (1.0,), recent=True)[0]
    if sum(x.row_bytes for x in layouts) <= sum(x.layout.row_bytes for x in final):
        return final
    key, value = (replace(x, layout=y) for x, y in zip(final, layouts, strict=True))
    return key, value


def _layouts(
    config: CompressionConfig,
    bases: Sequence[Basis],
    shapes: Sequence[tuple[int, int]],
    shares: tuple[float, ...],
    factors: tuple[float, ...],
    recent: bool = False,
) -> list[Layouts]:
    """Per tier those of keys and values, whose (heads, dim) are `shapes`."""
    basis, alike = bases[0], config.key_bits == config.value_bits
    profiled = isinstance(basis, Profiled)
    joint = config.allocation == "joint" and profiled and alike
    budget = Budget(
        config.key_bits, config.value_bits, joint, shares, factors, 1 - config.evict_ratio,
        config.ranked, recent,
    )  # fmt: skip
    if isinstance(basis, Profiled) and config.allocation != "uniform":
        return basis.profile.layouts(basis.layer, budget)
    every = torch.tensor(factors, dtype=torch.float64)[:, None, None, None]
    key, value = (every * uniform_costs(*shape) for shape in shapes)
    return budget.layouts([(key, value)])[0]


def _check_shapes(profile: Profile, layer: int, sides: tuple[Tensor, Tensor]) -> None:
    for name, x in zip(SIDES, sides, strict=True):
        heads, dim = getattr(profile.layers[layer], name).mean.shape
        if (heads, dim) != (x.shape[1], x.shape[-1]):
            raise ProfileError(
                f"the profile has {heads} KV heads of dimension {dim} for the {name}s of layer"
                f" {layer}, the model has {x.shape[1]} of {x.shape[-1]}: it is another model's, or"
                " damaged. Build one with `nexusquant calibrate`."
            )


def _own_centre(x: Tensor, empty: Tensor, enough: int) -> Centre:
    """Mean and deviation of every channel: without a profile, nothing else tells them apart."""
    some, none = _sampled(x, empty)
    usual = _usual(some, none)
    mean = _filled_mean(some, usual, enough)
    deviation = _filled_mean((some - mean).square(), usual, enough).sqrt()
    typical = deviation.square().mean(-1, keepdim=True).sqrt()
    deviation = deviation.clamp(min=0.05 * typical)
    return _checked(mean, _within_reach(deviation, x, empty, mean))


def _profiled_centre(x: Tensor, empty: Tensor, basis: Basis, all_alike: bool) -> Centre:
    """Mean, and one factor per head, of the rows that have enough tokens to tell."""
    enough = (~empty).sum(2, keepdim=True) >= _OWN_CENTRE
    if not bool(enough.any()) and not all_alike:
        return Centre(None, None)
    some, none = _sampled(x, empty)
    usual = _usual(some, none)
    mean = torch.where(enough, _mean(some, usual), basis.mean(x.device))
    forward = basis.forward(x.device).mT
    y = (some - mean) @ forward
    scale = _mean(y.square().mean(-1, keepdim=True), usual).sqrt()
    scale = torch.where(enough & (scale > 0), scale, 1.0)
    if all_alike:
        scale = _within_reach(scale, x @ forward, empty, mean @ forward)
    centre = _checked(mean, scale)
    if bool(enough.all()) or centre.mean is None:
        return centre
    exact = torch.where(enough, centre.mean.float(), basis.mean(x.device))  # as those rows alone
    return replace(centre, mean=exact)


def _within_reach(scale: Tensor, x: Tensor, empty: Tensor, mean: Tensor) -> Tensor:
    """`scale`, or so much more that vectors as large as the others can be coded; 1 for 0."""
    size = x.square().mean(-1, keepdim=True)
    ordinary = (size <= _ORDINARY**2 * _median(size, empty)) & ~empty
    apart = (x - mean).square().mean(-1, keepdim=True).masked_fill(~ordinary, 0)
    scale = torch.maximum(scale, apart.amax(2, keepdim=True).sqrt() / _REACH)
    rounding = mean.abs().amax(-1, keepdim=True) * 2.0**-17  # of a mean in fp16, within reach
    scale = torch.maximum(scale, rounding)
    return torch.where(scale > 0, scale, 1.0)


def _sampled(x: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """At most `_SAMPLE` tokens of a row, evenly spaced: means of so many are good to a thousandth.

    A row that ends early is sampled as if it were alone.
    """
    count = x.shape[2]
    if count <= _SAMPLE or not bool(empty.any()):
        step = -(-count // _SAMPLE)
        return x[:, :, ::step], empty[:, :, ::step]
    steps = -(-(~empty).sum(2, keepdim=True) // _SAMPLE)  # (batch, heads or 1, 1, 1)
    at = torch.arange(_SAMPLE, device=x.device)[:, None] * steps.clamp(min=1)
    outside, at = at >= count, at.clamp(max=count - 1)
    some = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[-1]))
    return some, empty.gather(2, at) | outside


def _usual(x: Tensor, empty: Tensor) -> Tensor:
    """Entries that may set the scale, (batch, heads, n, 1) bool: a single huge vector may not."""
    size = (x - _mean(x, ~empty)).square().sum(-1, keepdim=True)
    return (size <= _HUGE * _median(size, empty)) & ~empty


def _median(size: Tensor, empty: Tensor) -> Tensor:
    return size.masked_fill(empty, torch.nan).nanmedian(2, keepdim=True).values


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean over some of the entries, (batch, heads, 1, dim)."""
    count = where.sum(2, keepdim=True).clamp(min=1)
    return x.masked_fill(~where, 0).sum(2, keepdim=True) / count


def _filled_mean(x: Tensor, where: Tensor, enough: int) -> Tensor:
    """`_mean`; rows with fewer tokens than rows are ever coded with alone rely on the others."""
    count = where.sum(2, keepdim=True)
    share = count.clamp(max=enough) / enough
    mean = _mean(x, where)
    pooled = (mean * count).sum(0, keepdim=True) / count.sum(0, keepdim=True).clamp(min=1)
    return share * mean + (1 - share) * pooled


def _checked(mean: Tensor, scale: Tensor) -> Centre:
    """In fp16 where that changes nothing to speak of.

    Raises:
        NonFiniteError: NaN, infinity, or numbers whose square overflows.
    """
    if not bool(torch.isfinite(mean).all() & torch.isfinite(scale).all()):
        raise NonFiniteError(
            "NaN or infinity, or numbers too large to be squared, among the keys or values; they"
            " cannot be coded. Check the model's dtype and inputs, or use codec='exact'."
        )
    return Centre(_narrow(mean), _narrow(scale))


def _narrow(x: Tensor) -> Tensor:
    """In fp16, unless that would overflow or lose precision."""
    narrow = x.half()
    largest = x.abs().amax(-1, keepdim=True)
    near = (narrow.float() - x).abs() <= 2e-3 * largest
    return narrow if bool(near.all()) else x
