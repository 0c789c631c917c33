"""Long decoding: against a loop written out, against `divergence`, and bad input."""

from __future__ import annotations

import pytest
import torch

from nexusquant import ConfigError, NexusCache, evaluate

PREFIX, STEPS = 90, 100  # steps: one chunk of 64 and a part of one


def test_buckets_are_what_a_plain_loop_finds(model, input_ids):
    result = evaluate.drift(model, input_ids, PREFIX, "max", steps=STEPS, buckets=3)
    cache = NexusCache(model, "max")
    with torch.no_grad():
        full = model(input_ids, use_cache=False).logits[0, PREFIX : PREFIX + STEPS]
        model(input_ids[:, :PREFIX], cache=cache)
        steps = [
            model(input_ids[:, [at]], cache=cache).logits[0] for at in range(PREFIX, PREFIX + STEPS)
        ]
    kl = torch.nn.functional.kl_div(
        torch.cat(steps).log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert [(b.start, b.stop) for b in result.buckets] == [(0, 34), (34, 67), (67, 100)]
    for bucket in result.buckets:
        expected = kl[bucket.start : bucket.stop].mean().item()
        assert bucket.kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.slope == pytest.approx(result.buckets[2].kl / result.buckets[0].kl)
    assert result.after_steps == cache.stats()


def test_kept_exact_is_what_divergence_measures(model, input_ids):
    result = evaluate.drift(model, input_ids, PREFIX, "max", steps=STEPS, buckets=2)
    ids = input_ids[:, : PREFIX + STEPS]
    one_pass = evaluate.divergence(model, ids, PREFIX, "max", step=STEPS)
    assert result.prefill_kl == pytest.approx(one_pass.kl, rel=1e-3)
    assert result.after_prefill == one_pass.stats
    first, last = result.buckets
    assert result.prefill_slope == pytest.approx(last.prefill_kl / first.prefill_kl)


def test_decoded_tokens_are_compressed_and_cost_something(model, input_ids):
    result = evaluate.drift(model, input_ids, PREFIX, "max", steps=STEPS, buckets=2)
    assert result.after_steps.tokens == PREFIX + STEPS
    # The last 4 of 100 wait for their block of 16; the others are coded, none in fp16.
    assert result.after_steps.nbytes < result.after_steps.fp16_nbytes / 4
    assert result.kl > result.prefill_kl


def test_the_exact_codec_does_not_drift(model, input_ids):
    result = evaluate.drift(
        model, input_ids, PREFIX, "lossless", steps=STEPS, buckets=4, codec="exact"
    )
    for bucket in result.buckets:
        assert bucket.kl == pytest.approx(0, abs=1e-6)
        assert bucket.prefill_kl == pytest.approx(0, abs=1e-6)


def test_progress_is_reported_up_to_the_end(model, input_ids):
    lines: list[str] = []
    evaluate.drift(model, input_ids, PREFIX, steps=STEPS, report=lines.append)
    assert lines == ["token 64 of 100", "token 100 of 100"]


@pytest.mark.parametrize(
    ("steps", "buckets", "message"),
    [
        (111, 8, "at least 111 tokens behind the prefix"),
        (100, 1, "buckets=1: must be from 2 to the number of steps, 100"),
        (3, 4, "buckets=4: must be from 2 to the number of steps, 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, input_ids, steps, buckets, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.drift(model, input_ids, PREFIX, steps=steps, buckets=buckets)


def test_a_slope_from_zero_is_not_a_number(model, input_ids):
    stats = evaluate.divergence(model, input_ids, PREFIX, "max").stats
    buckets = (evaluate.DriftBucket(0, 1, 0.0, 0.5), evaluate.DriftBucket(1, 2, 0.1, 1.0))
    result = evaluate.Drift(buckets, stats, stats)
    assert result.slope != result.slope
    assert result.prefill_slope == 2
