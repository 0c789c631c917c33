"""Statistics of a layer against loops in float64, and against the Jacobian of its attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nexusquant.frame import KeyFrame
from nexusquant.math.klt import RIDGE
from nexusquant.sampling import CALIBRATION, PREFILL, Sampling
from nexusquant.statistics import LayerStatistics
from tests.statistics_cases import EVERYTHING, case, check, close


@pytest.mark.parametrize("page", [0, 1, 32])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 4), (2, 2)])
def test_frames_and_grouped_queries(page: int, kv_heads: int, group: int) -> None:
    check(case(page=page, kv_heads=kv_heads, group=group))


def test_without_a_rotary_embedding() -> None:
    check(replace(case(), frame=KeyFrame(None, 32)))


ALIKE = replace(EVERYTHING, attended=0.0)  # all tokens count the same in the covariances


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float) -> None:
    check(case(softcap=softcap, group=2))


@pytest.mark.parametrize(("project", "residual"), [(False, False), (True, False), (False, True)])
def test_an_unknown_output_side(project: bool, residual: bool) -> None:
    """Errors are relative to the attention output."""
    check(case(project=project, residual=residual, group=2))


def test_a_norm_behind_the_output_side_sets_what_is_added() -> None:
    check(case(group=2, behind=True))
    check(case(group=2, behind=True, residual=False))


@pytest.mark.parametrize("behind", [False, True])
def test_channels_count_as_the_norms_that_read_the_stream_pass_them_on(behind: bool) -> None:
    check(case(group=2, behind=behind, readers=2))
    check(case(group=2, behind=behind, readers=1, residual=False))


def test_noise_in_a_channel_that_no_norm_reads_is_harmless() -> None:
    """A huge one, as in Gemma 3: without its norms, nothing else would count."""
    one = case(readers=2)
    output = one.output
    assert output.residual is not None
    assert output.projection is not None
    assert output.readers is not None
    output.residual[..., 3] *= 1e4
    output.readers[:, 3] = 0
    mute = output.projection.clone()
    mute[3] = 0
    silent = replace(one, output=replace(output, projection=mute)).statistics()
    close(one.statistics().value.metric, silent.value.metric)


@pytest.mark.parametrize("page", [0, 32])
def test_the_longest_row_counts_and_padding_does_not(page: int) -> None:
    valid = torch.arange(40) >= torch.tensor([[12], [3], [30]])
    one = case(batch=3, group=2, page=page, valid=valid)
    for x in (one.keys, one.values, one.queries):
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    assert one.output.residual is not None
    one.output.residual.masked_fill_(~valid[..., None], torch.nan)
    check(one)


def test_queries_of_the_last_tokens_only() -> None:
    one = case(60, q_len=25)
    assert one.asked == list(range(35, 60))
    check(one)


def test_a_later_chunk_has_no_sinks() -> None:
    one = case(40, start=64)
    assert one.skip == 0
    check(one)


def test_scaled_rotations() -> None:
    """YaRN multiplies cos and sin; in the frame keys are divided by it, so queries gain it."""
    check(case(page=32, yarn=1.4))


@pytest.mark.parametrize("page", [0, 32])
def test_weights_and_metrics_are_the_jacobian_of_the_output(page: int) -> None:
    """Sum over tokens of J^T J, by autograd through the frame, attention and projection."""
    one = case(36, kv_heads=2, page=page, sampling=replace(EVERYTHING, influence=1.0))
    found, slots = one.statistics(), torch.arange(36).view(1, 1, -1)
    inside = one.frame.enter(one.keys, slots)
    asked = one.asked
    hidden = torch.arange(36) > torch.tensor(asked)[:, None]

    def output(keys: Tensor, values: Tensor) -> Tensor:
        logits = one.queries[:, :, asked] @ one.frame.leave(keys, slots).mT * one.scaling
        attended = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values)[0]
        heads = torch.stack([attended[h] @ one.projection(h).float().mT for h in range(2)])
        inverse = torch.tensor([one.inverse_residual(i) for i in asked])
        return heads * (inverse / len(asked)).sqrt()[:, None]

    jacobians = torch.autograd.functional.jacobian(output, (inside, one.values.contiguous()))
    for moments, jacobian in zip((found.key, found.value), jacobians, strict=True):
        for head in range(2):
            rows = jacobian[head, :, :, 0, head, 4:].flatten(0, 2).double()
            expected = rows.mT @ rows
            close((moments.weight[head] * moments.metric[head])[None], expected[None], 2e-3)


# -- sampling


def test_only_the_last_three_quarters_ask_and_later_tokens_do_not_matter() -> None:
    """But for the ranks, which all queries have a say in."""
    one = case(200)
    found = replace(one.statistics(), rank_costs=None)
    one.queries[:, :, :50] = torch.nan
    assert same(replace(one.statistics(), rank_costs=None), found)
    one.queries[:, :, -1] += 5
    assert not same(replace(one.statistics(), rank_costs=None), found)


def test_a_sample_of_pages_stands_for_all() -> None:
    """Of the uniform share; influence may sit in a few pairs."""
    sampling = replace(EVERYTHING, influence=0.0)
    every = case(1600, kv_heads=1, page=16, sampling=sampling)
    few = replace(every, sampling=replace(sampling, pages=16)).statistics()
    close(few.key.metric, every.statistics().key.metric.double(), 0.25)
    assert not torch.equal(few.key.metric, every.statistics().key.metric)


@pytest.mark.parametrize("sampling", [{"queries": 64}, {"asked": 8}])
def test_a_sample_of_queries_stands_for_all(sampling: dict[str, int]) -> None:
    every = case(600, kv_heads=1, group=4)
    found = replace(every, sampling=replace(EVERYTHING, **sampling)).statistics()
    for side in ("key", "value"):
        few, all_of_them = (getattr(x, side).weight for x in (found, every.statistics()))
        assert few != all_of_them
        assert 0.6 < float(few / all_of_them) < 1.6


def test_a_sample_of_keys_stands_for_all() -> None:
    every = case(600, sampling=ALIKE)
    half = replace(every, sampling=replace(ALIKE, keys=290)).statistics()
    for side in ("key", "value"):
        few, usual = (getattr(x, side).covariance for x in (half, every.statistics()))
        close(few, usual.double(), 0.25)
        assert not torch.equal(few, usual)


@pytest.mark.parametrize("sampling", [PREFILL, CALIBRATION], ids=["prefill", "calibration"])
def test_what_is_used_comes_near_everything(sampling: Sampling) -> None:
    every = case(1600, kv_heads=2, group=3)
    every = replace(every, sampling=replace(EVERYTHING, influence=sampling.influence))
    found, usual = replace(every, sampling=sampling).statistics(), every.statistics()
    close(found.value.metric, usual.value.metric.double(), 1e-6)
    close(found.key.metric, usual.key.metric.double(), 0.5)


# -- sinks, averages, profiles


def test_sinks_shape_the_attention_but_not_the_statistics() -> None:
    plain, loud = case(sampling=ALIKE), case(sampling=ALIKE)
    for name in ("keys", "values", "queries", "output"):
        setattr(loud, name, getattr(plain, name))
    loud.keys, loud.values = plain.keys.clone(), plain.values.clone()
    loud.keys[:, :, :4] *= 30
    loud.values[:, :, :4] *= 0.01
    found = [one.statistics() for one in (plain, loud)]
    for side in ("key", "value"):
        for name in ("mean", "covariance"):
            pair = [getattr(getattr(x, side), name) for x in found]
            assert torch.equal(*pair)
    assert not torch.allclose(found[0].value.weight, found[1].value.weight, rtol=0.05)
    check(loud)


def same(a: LayerStatistics, b: LayerStatistics) -> bool:
    fields = [
        [*vars(x.key).values(), *vars(x.value).values(), x.inverse_residual, *(x.rank_costs or ())]
        for x in (a, b)
    ]
    return all(torch.equal(x, y) for x, y in zip(*fields, strict=True))


def test_equal_input_gives_equal_statistics_and_profiles() -> None:
    one = case(group=2, batch=2)
    assert same(one.statistics(), one.statistics())
    profiles = [one.statistics().profile() for _ in range(2)]
    for side in ("key", "value"):
        for a, b in zip(*(vars(getattr(p, side)).values() for p in profiles), strict=True):
            assert torch.equal(a, b)


def test_several_texts_are_averaged() -> None:
    parts = [case().statistics() for _ in range(3)]
    mean = LayerStatistics.mean(parts)
    for side in ("key", "value"):
        for name in ("mean", "covariance", "metric", "weight"):
            every = [getattr(getattr(part, side), name) for part in parts]
            torch.testing.assert_close(getattr(getattr(mean, side), name), sum(every) / 3)
    inverse = sum(float(part.inverse_residual) for part in parts) / 3
    assert float(mean.inverse_residual) == pytest.approx(inverse)
    assert same(LayerStatistics.mean(parts[:1]), parts[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_profile_whitens_what_it_was_built_from(dtype: torch.dtype) -> None:
    one = case(300, group=2, sampling=ALIKE)
    one.keys, one.values, one.queries = (x.to(dtype) for x in (one.keys, one.values, one.queries))
    found = one.statistics()
    profile = found.profile()
    assert profile.inverse_residual == float(found.inverse_residual)
    bodies = one.inside(one.keys), one.values[0, :, one.skip :].float()
    for side, moments, x in zip(
        (profile.key, profile.value), (found.key, found.value), bodies, strict=True
    ):
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in vars(side).values())
        assert torch.equal(side.weight, moments.weight)
        assert torch.equal(side.mean, moments.mean)
        y = (x - side.mean[:, None]) @ side.forward.mT
        size = y.square().mean(1).unflatten(-1, (-1, 8)).mean(-1)
        torch.testing.assert_close(size, torch.ones_like(size), rtol=3e-2, atol=0)
        torch.testing.assert_close(
            y @ side.inverse.mT + side.mean[:, None], x, rtol=1e-3, atol=2e-3
        )
        assert (side.variance.diff(dim=-1) <= 0).all()
        added = (side.forward @ moments.added @ side.forward.mT).diagonal(dim1=1, dim2=2)
        coherence = added.unflatten(-1, (-1, 8)).mean(-1) / side.weight[:, None]
        torch.testing.assert_close(side.coherence, coherence.clamp(min=1), rtol=1e-3, atol=1e-3)
        # Unit noise in code space costs what the variances say, in the ridged metric.
        ridge = RIDGE * moments.metric.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        metric = moments.metric + ridge * torch.eye(x.shape[-1])
        cost = side.inverse.mT @ metric @ side.inverse
        close(cost, torch.diag_embed(side.variance.repeat_interleave(8, -1)).double(), 1e-2)


def test_constant_vectors_still_have_a_finite_profile() -> None:
    one = case()
    one.keys[:, 0], one.values[:, 1] = 1.5, 0.0
    profile = replace(one, frame=KeyFrame(None, 0)).statistics().profile()
    for side in (profile.key, profile.value):
        assert all(torch.isfinite(x).all() for x in vars(side).values())
        product = side.inverse.double() @ side.forward.double()
        torch.testing.assert_close(
            product, torch.eye(product.shape[-1]).expand_as(product).double(), rtol=0, atol=1e-3
        )
