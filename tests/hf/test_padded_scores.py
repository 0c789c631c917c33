"""Every scorer keeps the same tokens of a left-padded row as of that row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexusquant import CompressionConfig, NexusCache
from nexusquant.hf import second_pass
from nexusquant.scorers import SCORERS
from tests.chunks import body_slots
from tests.hf.models import left_padded, tiny

LENGTHS = [70, 40, 55]
SETTINGS = CompressionConfig(codec="exact", evict_ratio=0.5, recent=4)


def kept(cache: NexusCache, row: int, padding: int) -> list[list[list[int]]]:
    """Which of the row's tokens, per layer and head."""
    layers: list[Any] = cache.layers
    return [
        [
            [slot - padding for slot in head]
            for head in body_slots(stored, batch, stored.kv_heads)[row]
        ]
        for stored, batch in ((layer.stored, layer.batch_size) for layer in layers)
    ]


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False], ids=["positions", "mask"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scorer", sorted(SCORERS.keys() - {"random"}))
def test_rows_keep_what_they_keep_alone(
    scorer: str, kind: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `position_ids`, and with those that the model makes: of slots, or (OPT) of the mask."""
    monkeypatch.setattr(second_pass, "_PIECE", 24)
    model, (ids, mask) = tiny(kind), left_padded(LENGTHS)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 99)
    batch = NexusCache(model, SETTINGS, scorer=scorer)
    own = {"position_ids": positions} if given else {}
    model(ids, attention_mask=mask, cache=batch, **own)
    for row, length in enumerate(LENGTHS):
        padding = ids.shape[1] - length
        alone = NexusCache(model, SETTINGS, scorer=scorer)
        slots = torch.arange(padding, ids.shape[1])[None]
        own = {} if given or kind == "opt" else {"position_ids": slots}
        model(ids[row : row + 1, padding:], cache=alone, **own)
        assert kept(batch, row, padding) == kept(alone, 0, 0)
