"""Quality on a real model must not get worse unnoticed. Slow: fetches and runs SmolLM2-135M."""

from __future__ import annotations

import pytest

from nexusquant import evaluate
from nexusquant.calibration import ensure_profile
from nexusquant.demo import demo_text
from nexusquant.loading import demo_model, load_model

# preset: (ratio at least, KL at most). The KL is at most 1.3 times what `nexusquant evaluate demo`
# printed when the presets were set; docs/results has the figures over more texts.
BOUNDS = {
    "lossless": (6.9, 0.0037), "high": (10.2, 0.0104), "balanced": (17, 0.0295), "max": (33, 0.103),
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
