"""One layer's keys and values to pages and back."""

from __future__ import annotations

import random
import resource
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nexusquant.entropy.build import Sample, build_profile
from nexusquant.entropy.lattice import NOISE, Steps, quantize_ref, reconstruct_ref
from nexusquant.entropy.layer import LayerCode
from nexusquant.entropy.profile import COARSEST, FINEST, OCTAVE, StoreProfile
from nexusquant.errors import FormatError, NonFiniteError, ProfileError
from nexusquant.kernels import use_operator
from nexusquant.profile import LayerProfile
from tests.entropy.cases import HEADS, KEY, VALUE, page, profile, queries, side_of

STEP = -12
NONE = torch.zeros(1, dtype=torch.int16)


def counts_of(tokens: int, size: int) -> list[int]:
    return [min(size, tokens - at) for at in range(0, tokens, size)]


def extra_of(tokens: int) -> Tensor:
    return (torch.randint(-4, 9, (tokens,)) * (OCTAVE // 2)).short()


def without(*sides: int) -> StoreProfile:
    """A profile that codes nothing of these sides."""
    whole = profile()
    layers = {
        i: tuple(
            replace(side, group=torch.full_like(side.group, -600)) if k in sides else side
            for k, side in enumerate(layer)
        )
        for i, layer in whole.layers.items()
    }
    return replace(whole, layers=layers)


def expected(code: LayerCode, x: tuple[Tensor, Tensor], extra: Tensor, size: int) -> list[Tensor]:
    """What comes back, by the definitions."""
    out = []
    for side, vectors in zip(code.sides, x, strict=True):
        loud = (side.group.amax(0) - code.step >= -2 * OCTAVE).nonzero()
        coded = 8 * (int(loud[-1]) + 1)
        step = torch.exp2((extra.float() + code.step) / OCTAVE)
        variance = torch.exp2(2 / OCTAVE * side.level[:, :coded].float())
        y = (vectors.transpose(0, 1).flatten(1) - side.mean) @ side.matrix[:coded].T
        pages = []
        for part, own in zip(y.split(size), step.split(size), strict=True):
            steps = Steps(own[None], variance, side.decay[:coded].float())
            pages.append(reconstruct_ref(*quantize_ref(part[None], steps), steps)[0])
        back = torch.cat(pages) @ side.inverse[:, :coded].T + side.mean
        out.append(back.unflatten(-1, vectors.shape[::2]).transpose(0, 1))
    return out


@pytest.mark.parametrize(("tokens", "size"), [(1, 256), (2, 1), (75, 32), (256, 256), (300, 7)])
@pytest.mark.parametrize("each", [False, True])
def test_error_is_the_quantizers(each_operator: str, tokens: int, size: int, each: bool) -> None:
    x, extra = page(tokens), extra_of(tokens) if each else None
    code = LayerCode(profile(), 3, STEP)
    pages = code.encode(*x, extra, size)
    assert len(pages) == len(counts_of(tokens, size))
    found = code.decode(pages, counts_of(tokens, size), extra)
    definition = expected(code, x, torch.zeros(tokens) if extra is None else extra, size)
    for a, b, c in zip(found, definition, x, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert a.shape == c.shape
        assert a.dtype == torch.float32


def test_noise_is_the_lattices() -> None:
    """In the transform's unit, of coordinates that are far louder than the step."""
    x, code = page(512), LayerCode(profile(), 0, -100)
    pages = code.encode(*x)
    found = code.decode(pages, [256, 256])
    for side, a, b in zip(code.sides, x, found, strict=True):
        error = (a - b).transpose(0, 1).flatten(1) @ side.matrix.T
        assert error.square().mean() == pytest.approx(NOISE * 2 ** (-200 / OCTAVE), rel=0.05)


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_sides_without_any_coded_group_stay_at_their_mean(
    each_operator: str, sides: tuple[int, ...]
) -> None:
    x, code = page(40), LayerCode(without(*sides), 3, STEP)
    pages = code.encode(*x, page=32)
    found = code.decode(pages, [32, 8])
    whole = LayerCode(profile(), 3, STEP)
    kept = whole.decode(whole.encode(*x, page=32), [32, 8])
    for k in (0, 1):
        mean = code.sides[k].mean.view(HEADS, 1, -1)
        torch.testing.assert_close(found[k], mean.expand_as(x[k]) if k in sides else kept[k])
    assert (sum(map(len, pages)) == 0) == (len(sides) == 2)


def test_no_tokens_are_no_pages() -> None:
    code = LayerCode(profile(), 0, STEP)
    assert code.encode(*page(0)) == []
    keys, values = code.decode([], [])
    assert keys.shape == (HEADS, 0, KEY)
    assert values.shape == (HEADS, 0, VALUE)


def test_any_pages_decode_without_the_others(each_operator: str) -> None:
    tokens, size = 200, 64
    x, extra, code = page(tokens), extra_of(tokens), LayerCode(profile(), 0, STEP)
    pages, counts = code.encode(*x, extra, size), counts_of(tokens, size)
    whole = code.decode(pages, counts, extra)
    for chosen in ([0], [1], [3], [1, 2], [2, 0], [3, 0], [0, 1, 2, 3]):
        at = torch.cat([torch.arange(i * size, i * size + counts[i]) for i in chosen])
        part = code.decode([pages[i] for i in chosen], [counts[i] for i in chosen], extra[at])
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[:, at], rtol=0, atol=1e-5)
    alone = code.encode(*(v[:, 64:128] for v in x), extra[64:128], size)
    assert alone == pages[1:2]


def test_bytes_are_the_same_again_and_with_all_operators(each_operator: str) -> None:
    x, extra, code = page(100), extra_of(100), LayerCode(profile(), 0, STEP)
    pages = code.encode(*x, extra)
    before = use_operator("reference")
    try:
        assert LayerCode(profile(), 0, STEP).encode(*x, extra) == pages
    finally:
        use_operator(before)


def test_dtypes_are_read_alike() -> None:
    x, code = [v.half() for v in page(30)], LayerCode(profile(), 0, STEP)
    pages = code.encode(x[0], x[1])
    assert code.encode(x[0].float(), x[1].float()) == pages
    strided = [torch.stack([v, v], -1)[..., 1] for v in x]
    assert code.encode(strided[0], strided[1]) == pages
    assert code.encode(*(v.requires_grad_() for v in x)) == pages


def test_bytes_and_error_move_with_the_step() -> None:
    x, sizes, errors = page(256), [], []
    for step in range(-100, COARSEST, 2 * OCTAVE):
        code = LayerCode(profile(), 0, step)
        pages = code.encode(*x)
        sizes.append(sum(map(len, pages)))
        found = code.decode(pages, [256])
        errors.append(sum(float((a - b).square().mean()) for a, b in zip(x, found, strict=True)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[0] > 20 * sizes[-1]


def test_tokens_of_finer_steps_are_better() -> None:
    x, code = page(256), LayerCode(profile(), 0, STEP)
    extra = torch.where(torch.arange(256) % 2 == 0, -24, 24).short()
    found = code.decode(code.encode(*x, extra), [256], extra)
    for a, b in zip(x, found, strict=True):
        error = (a - b).square().mean((0, 2))
        assert error[::2].mean() * 20 < error[1::2].mean()


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 2.0, 3.0, 6.0])
def test_the_step_asked_for_takes_about_the_bits(bits: float) -> None:
    tokens, taken, elements = 512, 0, 0
    extra = torch.where(torch.arange(tokens) % 4 == 0, -12, 6).short()
    step = profile().step_for(bits, extra)
    for seed in (21, 22):
        x = page(tokens, seed)
        taken += sum(map(len, LayerCode(profile(), 0, step).encode(*x, extra))) * 8
        elements += x[0].numel() + x[1].numel()
    assert taken / elements == pytest.approx(bits, rel=0.08)


def test_steps_follow_what_tokens_have_on_top() -> None:
    plain = profile().step_for(2.0, NONE)
    assert profile().step_for(2.0, NONE + 12) == plain - 12
    assert profile().step_for(1e9, NONE) == FINEST
    assert profile().step_for(0.0, NONE) == COARSEST
    steps = [profile().step_for(b / 4, NONE) for b in range(40)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_refused(value: float, side: int) -> None:
    for source in (profile(), without(0, 1)):
        x = page(20)
        x[side][1, 13, 5] = value
        with pytest.raises(NonFiniteError, match="layer 3"):
            LayerCode(source, 3, STEP).encode(*x)


@pytest.mark.parametrize("value", [1e9, 1e20, 3e38])
def test_vectors_too_long_to_code_are_refused(each_operator: str, value: float) -> None:
    for sign in (-1, 1):
        x = page(20)
        x[0][1, 13, 5] = sign * value
        with pytest.raises(NonFiniteError):
            LayerCode(profile(), 0, STEP).encode(*x)


@pytest.mark.parametrize("shape", [(HEADS, 5, KEY + 8), (HEADS + 1, 5, KEY), (1, 5, KEY)])
def test_other_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ProfileError, match="another model"):
        LayerCode(profile(), 0, STEP).encode(torch.zeros(shape), page(5)[1])


def test_unknown_layers_and_steps_are_refused() -> None:
    with pytest.raises(ProfileError, match="layer 1"):
        LayerCode(profile(), 1, STEP)
    for step in (FINEST - 1, COARSEST + 1, 1 << 80):
        with pytest.raises(FormatError, match="step number"):
            LayerCode(profile(), 0, step)


def test_pages_and_counts_that_do_not_fit_are_refused() -> None:
    x, code = page(20), LayerCode(profile(), 0, STEP)
    pages = code.encode(*x, page=10)
    for counts in ([10], [10, 10, 10], [10, 0], [10, -1]):
        with pytest.raises(FormatError, match="damaged"):
            code.decode(pages, counts)
    for extra in (extra_of(19), extra_of(21)):
        with pytest.raises(FormatError, match="damaged"):
            code.decode(pages, [10, 10], extra)


def take(code: LayerCode, data: bytes, count: int, extra: Tensor | None) -> bool:
    """Whether a page decodes; anything but FormatError would pass through."""
    try:
        found = code.decode([data], [count], extra)
    except FormatError:
        return False
    assert all(torch.isfinite(x).all() and x.shape[1] == count for x in found)
    return True


def test_hostile_pages_decode_to_numbers_or_are_refused() -> None:
    source = random.Random(0)
    codes = [LayerCode(profile(), 0, step) for step in (FINEST, -60, STEP, COARSEST)]
    wild = torch.tensor([-(2**15), 2**15 - 1, 0, 24, -24], dtype=torch.int16)
    taken = 0
    for trial in range(3000):
        data = source.randbytes(4 * source.randrange(0, 12) + (trial % 50 == 0))
        count = source.randrange(1, 6)
        extra = wild[torch.randint(0, 5, (count,))] if trial % 2 else None
        taken += take(source.choice(codes), data, count, extra)
    assert 0 < taken < 3000


def test_hostile_pages_take_no_more_memory_than_honest_ones() -> None:
    code = LayerCode(profile(), 0, STEP)
    source = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        take(code, source.randbytes(4000), 256, None)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 64 << 20


def test_directions_that_no_text_had_are_not_lost(each_operator: str) -> None:
    """The profile's text says nothing of half of them."""
    half = [x * (torch.arange(x.shape[-1]) % 2) for x in page(512)]
    layers = {0: LayerProfile(side_of(HEADS, KEY), side_of(HEADS, VALUE))}
    narrow = build_profile(layers, {0: [Sample(*half)]}, {0: queries()}, "abc", "text", 512)
    x, code = page(100), LayerCode(narrow, 0, -8 * OCTAVE)
    for a, b in zip(code.decode(code.encode(*x), [100]), x, strict=True):
        assert (a - b).norm() < 0.05 * (b - b.mean(1, keepdim=True)).norm()
