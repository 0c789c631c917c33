"""Both directions with the presses of kvpress itself, where it is installed."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from nexusquant import NexusCache, register_scorer
from nexusquant.errors import UnsupportedError
from nexusquant.kvpress import PressedCache, PressScorer
from nexusquant.scorers import ScoreInputs
from tests.kvpress_cases import EXACT, pressed, slots

pytestmark = pytest.mark.usefixtures("own_scorers")
SCORERS = {
    "KnormPress": {},
    "KeyDiffPress": {},
    "LagKVPress": {"lag_size": 32},
    "CURPress": {},
    "StreamingLLMPress": {},
    "SnapKVPress": {"window_size": 16},
    "TOVAPress": {},
    "ExpectedAttentionPress": {},
    "NonCausalAttnPress": {},
}


@pytest.fixture(scope="module")
def kvpress() -> ModuleType:
    """The package, whose dependencies warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("kvpress")


@pytest.fixture
def with_hooks(kvpress: ModuleType, model: LlamaForCausalLM) -> ModuleType:
    """kvpress, if its own hooks run with this version of transformers."""
    try:
        with torch.no_grad(), kvpress.KnormPress(0.5)(model):
            model(torch.tensor([[2, 3, 4, 5]]), past_key_values=DynamicCache(config=model.config))
    except KeyError as error:
        pytest.skip(f"kvpress's hooks miss {error} with this version of transformers")
    return kvpress


def chosen(press: Any, model: Any, ids: Tensor, ratio: float) -> list[list[set[int]]]:
    """The positions of the best scores, per layer and head, from an uncompressed prefill."""
    cache, seen = DynamicCache(config=model.config), []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        scores = press.score(
            module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs
        )
        kept = int(ids.shape[1] * (1 - ratio))
        seen.append([set(row) for row in scores.topk(kept, dim=-1).indices[0].tolist()])

    hooks = []
    for layer in model.model.layers:
        vars(layer.self_attn)["rotary_emb"] = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(look, with_kwargs=True))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for hook, layer in zip(hooks, model.model.layers, strict=True):
        hook.remove()
        del vars(layer.self_attn)["rotary_emb"]
    return seen


@pytest.mark.parametrize("name", SCORERS)
def test_kvpress_scores_keep_what_kvpress_keeps(
    kvpress: ModuleType, model: LlamaForCausalLM, input_ids: Tensor, name: str
) -> None:
    press = getattr(kvpress, name)(compression_ratio=0.5, **SCORERS[name])
    register_scorer("press", PressScorer(press, model))
    cache = NexusCache(model, EXACT, scorer="press", evict_ratio=0.5)
    with torch.no_grad():
        model(input_ids, past_key_values=cache)
    assert [slots(cache, layer) for layer in range(2)] == chosen(press, model, input_ids, 0.5)


def test_expected_attention_of_kvpress_in_later_passes(
    kvpress: ModuleType, model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    """Its future is counted from the pass, not from 0: positions cancel, as queries do not move."""
    press = kvpress.ExpectedAttentionPress(0.5, n_sink=0)
    asked = []

    class Noted(PressScorer):
        def score(self, inputs: ScoreInputs) -> Tensor:
            asked.append(super().score(inputs))
            return asked[-1]

    register_scorer("press", Noted(press, model))
    positions = torch.arange(100)[None]
    for first in (0, 300):
        with torch.no_grad():
            model(
                input_ids[:, :100], past_key_values=NexusCache(model, scorer="press"),
                position_ids=positions + first,
            )  # fmt: skip
    torch.testing.assert_close(asked[0], asked[2], rtol=1e-3, atol=1e-5)


def test_scorers_of_kvpress_that_need_attention_weights(
    kvpress: ModuleType, model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    register_scorer("press", PressScorer(kvpress.ObservedAttentionPress(0.5), model))
    with torch.no_grad(), pytest.raises(UnsupportedError, match="ObservedAttentionPress"):
        model(input_ids, past_key_values=NexusCache(model, scorer="press"))


def _under(kvpress: ModuleType, name: str) -> Any:
    made = {
        "SnapKVPress": lambda: kvpress.SnapKVPress(0.5, window_size=16),
        "ExpectedAttentionPress": lambda: kvpress.ExpectedAttentionPress(0.3),
        "PyramidKVPress": lambda: kvpress.PyramidKVPress(0.6, window_size=4, beta=2),
        "ChunkKVPress": lambda: kvpress.ChunkKVPress(kvpress.KnormPress(0.5), chunk_length=16),
        "PerLayerCompressionPress": lambda: kvpress.PerLayerCompressionPress(
            kvpress.KnormPress(0.5), [0.25, 0.5]
        ),
        "AdaKVPress": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=16)),
    }
    return made[name]()


@pytest.mark.parametrize(
    "name",
    ["SnapKVPress", "ExpectedAttentionPress", "PyramidKVPress", "ChunkKVPress",
     "PerLayerCompressionPress", "AdaKVPress"],
)  # fmt: skip
def test_under_presses_of_kvpress_logits_are_theirs(
    with_hooks: ModuleType, model: LlamaForCausalLM, input_ids: Tensor, name: str
) -> None:
    press, more = _under(with_hooks, name), input_ids[:, :1]
    theirs, plain = pressed(press, model, DynamicCache(config=model.config), input_ids, more)
    ours, cache = pressed(press, model, PressedCache(model, EXACT), input_ids, more)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 201
    if name != "AdaKVPress":
        assert cache.stats().kept_tokens == sum(x.keys.shape[2] for x in plain.layers) / 2
    else:
        counts = [[len(head) for head in slots(cache, layer)] for layer in range(2)]
        assert [sum(count) for count in counts] == [200, 200]
        assert any(first != second for first, second in counts)
    _, coded = pressed(press, model, PressedCache(model, "high"), input_ids, more)
    assert coded.stats().compressed_layers == 2


def test_generating_under_a_press_of_kvpress(
    with_hooks: ModuleType, model: LlamaForCausalLM, input_ids: Tensor
) -> None:
    cache = PressedCache(model, "high")
    with with_hooks.KnormPress(0.5)(model):
        output = model.generate(
            input_ids, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    assert output.shape == (1, 240)
    assert cache.stats().kept_tokens == 139


@pytest.mark.parametrize("name", ["KeyRerotationPress", "ComposedPress"])
def test_presses_of_kvpress_that_do_more_than_choosing(
    with_hooks: ModuleType, model: LlamaForCausalLM, input_ids: Tensor, name: str
) -> None:
    knorm = with_hooks.KnormPress(0.5)
    press = {
        "KeyRerotationPress": lambda: with_hooks.KeyRerotationPress(knorm),
        "ComposedPress": lambda: with_hooks.ComposedPress([knorm, with_hooks.KnormPress(0.3)]),
    }[name]()
    with torch.no_grad(), press(model), pytest.raises(UnsupportedError):
        model(input_ids, past_key_values=PressedCache(model))
