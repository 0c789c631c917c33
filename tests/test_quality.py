"""Quality on a real model must not get worse unnoticed. Slow: fetches and runs SmolLM2-135M."""

from __future__ import annotations

import pytest

from nexusquant import evaluate
from nexusquant.calibration import ensure_profile
from nexusquant.demo import demo_text
from nexusquant.loading import demo_model, load_model

# preset: (ratio at least, KL at most). The KL is at most 1.3 times that of one pass on 2026-11-29
# with the profile of the package's own text (0.0047, 0.0145, 0.0396, 0.1072).
BOUNDS = {
    "lossless": (6.9, 0.0061), "high": (10.2, 0.0189), "balanced": (17, 0.0515), "max": (33, 0.139),
}  # fmt: skip


@pytest.fixture(scope="module")
def lab():
    model, tokenizer = load_model(demo_model(), "float32", "cpu")
    ensure_profile(model, tokenizer)
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOUNDS)
def test_preset(lab, preset):
    model, tokenizer = lab
    ids = tokenizer(demo_text(), return_tensors="pt").input_ids[:, : 1536 + 512]
    result = evaluate.divergence(model, ids, 1536, preset)
    ratio, kl = BOUNDS[preset]
    assert result.stats.compression_ratio >= ratio
    assert result.kl <= kl
