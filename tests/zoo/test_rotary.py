"""Every kind of rotary embedding is undone, in the layers that have one and in no others."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from nexusquant import NexusCache
from tests.hf.models import left_padded
from tests.zoo.builders import build

# Model type to the layers (of 4) that are rotated, None for all.
KINDS: dict[str, dict[str, tuple[int, ...] | None]] = {
    "split halves": {"llama": None, "qwen3": None, "persimmon": None},
    "partial": {"phi": None, "stablelm": None, "gpt_neox": None, "glm4_moe": None},
    "interleaved": {
        "gptj": None, "codegen": None, "cohere": None, "glm": None, "ernie4_5": None,
        "helium": None,
    },
    "complex": {"llama4": (0, 2), "llama4_text": (0, 2)},
    "half width": {"gpt_oss": None},
    "proportional": {"gemma4_text": (0, 1)},  # the others share keys and values
    "per layer": {"gemma3_text": None, "olmo3": None, "modernbert-decoder": None},
    "not everywhere": {"cohere2": (0, 2), "exaone4": (0, 2), "smollm3": (0, 2)},
    "looked up by the module": {"moshi": None, "falcon": None},
    "none": {"gpt2": (), "opt": (), "bloom": (), "mpt": (), "jamba": ()},
}  # fmt: skip
CASES = [(name, layers) for kind in KINDS.values() for name, layers in kind.items()]


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "rotated"), CASES, ids=[name for name, _ in CASES])
def test_keys_come_back_as_they_were(model_type: str, rotated: tuple[int, ...] | None) -> None:
    model = build(model_type)
    settings = {"key_bits": 8, "value_bits": 8, "tiers": (), "evict_ratio": 0.0, "sinks": 0}
    cache = NexusCache(model, **settings)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids, mask = left_padded([44, 40])
    for each in (cache, stock):
        model(input_ids=ids, attention_mask=mask, cache=each)
    attention = [i for i, x in enumerate(cache.layers) if getattr(x, "tail", None) is not None]
    found = tuple(i for i in attention if cache.layers[i].rope is not None)
    assert found == (tuple(attention) if rotated is None else rotated)
    for index in attention:
        assert cache.layers[index].stored.count
        keys, _ = cache.layers[index].keys.snapshot.filled(0)
        wanted = stock.layers[index].keys
        keys, wanted = keys[:, :, -32:], wanted[:, :, -32:]
        torch.testing.assert_close(keys, wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))
    for table in {
        id(x.rope.table): x.rope.table for x in map(cache.layers.__getitem__, found)
    }.values():
        assert all(span.rows is None for span in table.spans)  # positions and frequencies suffice
