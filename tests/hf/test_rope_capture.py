"""Un-rotated keys are the keys the model had before RoPE, and rotary rows are stored compactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nexusquant import CompressionConfig, NexusCache
from nexusquant.hf.quirks import RotaryCall
from nexusquant.hf.rope_tables import RopeBook, rotary_frequencies
from tests.hf.models import assert_same_run, generate, left_padded, prompt, step_logits, tiny
from tests.hf.situation_cases import CODED

# Everything waits, uncoded, with its rows; RoPE is removed altogether.
KEEP = CompressionConfig(residual_length=100_000, rope_page=1)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": LLAMA3,
}


def scaled(name: str) -> Any:
    rope = {"rope_theta": 10_000.0, **ROPES[name]}
    longest = 64 if name == "dynamic" else 8192
    return tiny("llama", rope_parameters=rope, max_position_embeddings=longest)


class Keys:
    """Keys before RoPE, per layer, as the model computes them."""

    def __init__(self, model: Any) -> None:
        self.of: dict[int, list[Tensor]] = {}
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            source = getattr(attention, "k_norm", attention.k_proj)  # gemma3 norms them first

            def note(_: Any, args: Any, out: Tensor, index: int = index) -> None:
                heads = out if out.ndim == 4 else out.unflatten(-1, (-1, 16)).transpose(1, 2)
                self.of.setdefault(index, []).append(heads)

            source.register_forward_hook(note)

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat(self.of[index], 2)


def assert_unrotated(cache: NexusCache, keys: Keys) -> None:
    for index, layer in enumerate(cache.layers):
        assert layer.rope is not None
        start = layer.tail_start
        tail = layer.tail.keys
        slots = torch.arange(start, start + tail.shape[2]).view(1, 1, -1)
        frame = layer.frame()
        plain = frame.enter(tail, slots)
        torch.testing.assert_close(plain, keys[index][:, :, start:], rtol=0, atol=2e-5)
        torch.testing.assert_close(frame.leave(plain, slots), tail, rtol=0, atol=2e-5)


@torch.no_grad()
def feed(model: Any, cache: NexusCache, ids: Tensor, steps: list[int], **kwargs: Any) -> None:
    begin = 0
    for step in steps:
        model(ids[:, begin : begin + step], cache=cache, **kwargs)
        begin += step


@pytest.mark.parametrize("name", ROPES)
def test_scalings(name: str) -> None:
    model = scaled(name)
    cache, keys = NexusCache(model, KEEP), Keys(model)
    feed(model, cache, prompt(100, batch=2), [40, 40, *[1] * 20])
    assert_unrotated(cache, keys)
    spans = cache.layers[0].rope.table.spans
    # One run of positions, shared by all rows and layers. Under dynamic NTK every decoded token has
    # new frequencies: their rows are stored, as one run.
    stored = [span.rows is not None for span in spans]
    assert stored == ([False, False, True] if name == "dynamic" else [False])
    assert all(len(span.positions) == 1 for span in spans if span.rows is None)
    assert len({id(layer.rope.table) for layer in cache.layers}) == 1


@pytest.mark.parametrize("page", [8, 32])
@pytest.mark.parametrize("name", ["default", "linear", "yarn", "llama3"])
def test_keys_are_turned_back_to_the_start_of_their_page(name: str, page: int) -> None:
    """In the frame, a key at position p looks as if it were at position p mod page."""
    model = scaled(name)
    cache, keys = NexusCache(model, KEEP, rope_page=page), Keys(model)
    feed(model, cache, prompt(100, batch=2), [40, 40, *[1] * 20])
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(100)[None] % page)
    # Yarn's rows also scale, which the frame undoes with the rotation.
    scaling = model.model.rotary_emb.attention_scaling
    slots = torch.arange(100).view(1, 1, -1)
    for index, layer in enumerate(cache.layers):
        mine = layer.frame().enter(layer.tail.keys, slots)
        _, want = apply_rotary_pos_emb(keys[index], keys[index], cos / scaling, sin / scaling)
        torch.testing.assert_close(mine, want, rtol=0, atol=2e-5)
        back = layer.frame().leave(mine, slots)
        torch.testing.assert_close(back, layer.tail.keys, rtol=0, atol=2e-5)


def test_gemma3_has_one_table_per_kind_of_layer() -> None:
    model = tiny("gemma3")
    cache, keys = NexusCache(model, KEEP), Keys(model)
    feed(model, cache, prompt(60), [30, *[1] * 30])
    assert_unrotated(cache, keys)
    tables = [layer.rope.table for layer in cache.layers]
    assert tables[0] is tables[2] is not tables[1]
    assert all(len(t.spans) == 1 and t.spans[0].rows is None for t in tables)
    sliding, full = (t.spans[0].frequencies for t in tables[:2])
    assert not torch.equal(sliding, full)


def test_left_padding_and_explicit_positions() -> None:
    model = tiny("llama")
    ids, mask = left_padded([50, 31])
    cache, keys = NexusCache(model, KEEP), Keys(model)
    generate(model, ids, 6, attention_mask=mask, cache=cache)
    assert_unrotated(cache, keys)
    span = cache.layers[0].rope.table.spans[0]
    assert span.positions.shape == (2, 55)
    assert span.positions[1, 19:].tolist() == list(range(36))

    positions = torch.tensor([[0, 1, 2, 3, 100, 101, 102, 50, 51, 7]])
    model = tiny("llama")
    cache, keys = NexusCache(model, KEEP), Keys(model)
    feed(model, cache, prompt(10), [10], position_ids=positions)
    assert_unrotated(cache, keys)
    span = cache.layers[0].rope.table.spans[0]
    assert torch.equal(span.positions.long(), positions)


@pytest.mark.parametrize("name", ["default", "dynamic", "yarn"])
def test_coded_keys_come_back_in_every_scaling(name: str) -> None:
    """4-bit codes of un-rotated keys, rotated back: near the stock keys, at every slot."""
    model = scaled(name)
    settings = CODED.replace(key_bits=4, value_bits=4, sinks=0, tiers=())
    cache = NexusCache(model, settings)
    feed(model, cache, prompt(96), [40, 40, *[1] * 16])
    reference = NexusCache(model, KEEP)
    feed(model, reference, prompt(96), [40, 40, *[1] * 16])
    ours, stock = cache.layers[0].keys + 0, reference.layers[0].keys + 0
    error = (ours - stock).square().sum(-1) / stock.square().mean(-1).sum(-1, keepdim=True) * 96
    assert (ours - stock).square().mean() < 0.02 * stock.var()
    assert error.shape == (1, 2, 96)
    worst = (ours - stock).square().mean(-1) / stock.square().mean(-1)
    assert worst.max() < 0.25


def test_rows_no_frequencies_explain_are_stored_as_they_are() -> None:
    """A model whose rotary rows follow no inverse frequency we can find."""
    model = tiny("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def warped(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = forward(x, position_ids)
        angle = torch.atan2(sin, cos) + 0.3 * position_ids[..., None].float().sqrt()
        return angle.cos(), angle.sin()

    rotary.forward = warped
    cache, keys = NexusCache(model, KEEP), Keys(model)
    feed(model, cache, prompt(40, batch=2), [20, *[1] * 20])
    assert_unrotated(cache, keys)
    (span,) = cache.layers[0].rope.table.spans
    assert span.rows[0].shape == (1, 40, 16)
    stock = generate(model, prompt(40))
    ours = generate(
        model, prompt(40), cache=NexusCache(model, CODED, codec="exact", evict_ratio=0.0)
    )
    assert_same_run(ours, stock)


def test_a_model_without_rope_keeps_its_keys_as_they_are() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1,
            eos_token_id=None, pad_token_id=0, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    stock = generate(model, prompt(40))
    exact = NexusCache(model, CODED, codec="exact")
    assert_same_run(generate(model, prompt(40), cache=exact), stock)
    cache = NexusCache(model, CODED, key_bits=4, value_bits=4)
    ours = generate(model, prompt(40), cache=cache)
    assert all(layer.rope is None for layer in cache.layers)
    assert cache.stats().compressed_layers == 2
    assert (step_logits(ours)[:, 1] - step_logits(stock)[:, 1]).abs().max() < 0.5


@pytest.mark.parametrize(
    ("cos", "sin"),
    [
        (torch.zeros(1, 9, 16), torch.zeros(1, 9, 16)),  # not invertible
        (torch.ones(1, 9, 48), torch.zeros(1, 9, 48)),  # not rows of this layer
    ],
    ids=["zero", "too_wide"],
)
def test_wrong_rows_leave_keys_as_rotated(cos: Tensor, sin: Tensor) -> None:
    model = tiny("llama")
    module = model.model.layers[0].self_attn
    book = RopeBook()

    def record(call: RotaryCall | None) -> Any:
        return book.record(None, call, module, 0, lambda: rotary_frequencies(model), 16)

    assert record(RotaryCall(cos, sin, None, cos)) is None
    assert record(None) is None
    assert not book.tables
    right = model.model.rotary_emb(cos, torch.arange(9)[None])
    assert record(RotaryCall(*right, None, right[0])) is not None
