"""Every causal LM type: exact codes change nothing, real codes take what the config promised."""

from __future__ import annotations

from typing import Any

import pytest

from nexusquant.hf.coverage import CODES, DECODED, EXACT, KEPT, WHOLE, cover_types
from tests.zoo.builders import UNBUILT, ZOO, quiet
from tests.zoo.matrix import LONG, measure

TOLERANCE = 1e-4  # of the largest logit, absolute if that is below one
FEW_TOKENS = ("musicgen",)  # starts from one token, whatever the prompt


@pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning")
@pytest.mark.parametrize("model_type", ZOO)
def test_type(model_type: str) -> None:
    row = measure(model_type)
    coverage = row.coverage
    if coverage.refused:
        assert coverage.refused in row.refused
        return
    assert not row.refused
    assert row.same_tokens
    assert row.error <= TOLERANCE * max(1.0, row.scale)
    assert row.finite
    for layer, planned in zip(row.layers, coverage.layers, strict=True):
        if layer is None or layer.tail is None:
            continue
        assert treatment(layer) == {DECODED: CODES}.get(planned.treatment, planned.treatment)
        keys, values = layer.tail.keys, layer.tail.values
        found = keys.shape[1], keys.shape[3], values.shape[3]
        assert found == (planned.kv_heads, planned.key_dim, planned.value_dim)
    if coverage.status != "exact" and model_type not in FEW_TOKENS:
        assert all(layer.length > LONG for layer in row.layers if layer and layer.length)
        assert 0.3 < row.nbytes / row.expected < 1.15
        assert row.ratio > 2.4


def treatment(layer: Any) -> str:
    """What became of a layer; whether the model multiplies itself does not show."""
    if layer.exact:
        return EXACT
    if not layer.reached:
        return WHOLE
    return KEPT if layer.read else CODES


def test_every_type_is_in_the_table() -> None:
    with quiet():
        found = cover_types()
    assert set(found) >= set(ZOO) | set(UNBUILT)
    for coverage in found.values():
        assert coverage.status == "compressed" or coverage.reasons
