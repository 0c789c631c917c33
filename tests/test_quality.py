"""Quality on a real model must not get worse unnoticed. Slow: fetches and runs SmolLM2-135M."""

from __future__ import annotations

import pytest

from nexusquant import evaluate
from nexusquant.calibration import ensure_profile
from nexusquant.demo import demo_text
from nexusquant.loading import demo_model, load_model

# preset: (ratio at the end at least, KL at most), the KL 1.3 times that of 2026-11-29 with
# the profile of the package's own text (0.0045, 0.0128, 0.0392, 0.1439).
BOUNDS = {
    "lossless": (6.1, 0.0059), "high": (8.4, 0.0167), "balanced": (12.8, 0.051),
    "max": (21, 0.187),
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
    ids = tokenizer(demo_text(), return_tensors="pt").input_ids[:, : 1536 + 320]
    result = evaluate.divergence(model, ids, 1536, preset)
    ratio, kl = BOUNDS[preset]
    assert result.final.compression_ratio >= ratio
    assert result.kl <= kl
