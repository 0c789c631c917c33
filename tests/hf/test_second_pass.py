"""KVzip: the prompt is read twice, and only its importance remains of the second time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import (
    CompressionConfig,
    NexusCache,
    NexusQuantSimple,
    nexusquant_evict,
    register_scorer,
)
from nexusquant.hf import second_pass
from nexusquant.hf.notices import NexusQuantWarning
from nexusquant.quantizer import Profiled
from nexusquant.scorers import ScoreInputs
from nexusquant.scorers.base import causal_attention
from tests.chunks import body_slots
from tests.hf.models import KINDS, feed, left_padded, prompt, tiny

KVZIP = CompressionConfig(codec="exact", evict_ratio=0.5, scorer="kvzip", recent=4)


def kept(cache: NexusCache, layer: int) -> list[list[list[int]]]:
    """Slots per row and head."""
    stored = cache.layers[layer].stored
    return body_slots(stored, cache.layers[layer].batch_size, stored.kv_heads)


def test_the_tokens_kept_are_those_attended_to_by_a_repetition() -> None:
    """Against one plain forward pass over the prompt written twice."""
    model, ids = tiny(), prompt(60)
    cache = NexusCache(model, KVZIP)
    feed(model, cache, ids, 60)
    calls: list[dict[str, Tensor]] = []

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        calls.append({"query": query, "key": key})
        return original(module, query, key, value, *args, **kwargs)

    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", spy)
    try:
        model(torch.cat([ids, ids], 1), use_cache=False)
    finally:
        AttentionInterface.register("sdpa", original)
    for index, call in enumerate(calls):
        weight = causal_attention(
            call["query"][:, :, 60:], call["key"], None, first=60, scaling=16**-0.5
        )
        score = weight[..., :60].amax((2, 3))[0]
        for head in range(2):
            middle = score[head, 4:56].argsort(descending=True)[:22] + 4
            expected = sorted([*middle.tolist(), *range(56, 60)])
            assert kept(cache, index)[0][head] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_remains_of_the_second_pass(kind: str) -> None:
    """Without eviction the outcome is that of one pass, bit for bit."""
    model, ids = tiny(kind), prompt(90)
    settings = CompressionConfig(residual_length=8, tiers=(), transform="hadamard")
    once = NexusCache(model, settings)
    twice = NexusCache(model, settings.replace(scorer="kvzip", tiers=(0.5,), tier_bits=0))
    for cache in (once, twice):
        feed(model, cache, ids, 90)
        assert cache.get_seq_length() == 90
    exact = NexusCache(model, "lossless", codec="exact"), NexusCache(model, KVZIP, evict_ratio=0.01)
    a, b = (feed(model, cache, ids, 90) for cache in exact)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    lengths = {layer.rope.table.length for layer in twice.layers if layer.rope is not None}
    feed(model, twice, ids[:, :3], 3)
    assert all(length >= 90 for length in lengths)
    assert {x.rope.table.length for x in twice.layers if x.rope is not None} <= {93}


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt(70, seed=2)
    monkeypatch.setattr(second_pass, "_PIECE", 70)
    whole = NexusCache(model, KVZIP)
    feed(model, whole, ids, 70)
    monkeypatch.setattr(second_pass, "_PIECE", 13)
    pieces = NexusCache(model, KVZIP)
    feed(model, pieces, ids, 70)
    both = set(kept(pieces, 0)[0][0]) & set(kept(whole, 0)[0][0])
    assert len(both) > 20, "a piece sees only part of the repetition, but the same prompt"


@torch.no_grad()
def test_arguments_by_place_and_one_mask_for_all_rows() -> None:
    model, (ids, mask) = tiny(), left_padded([70, 40])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [NexusCache(model, KVZIP) for _ in range(4)]
    model(ids, attention_mask=mask, position_ids=positions, cache=caches[0])
    model(ids, mask, positions, caches[1])
    model(ids, cache=caches[2])
    model(ids, attention_mask=torch.ones(1, 70), cache=caches[3])
    assert kept(caches[0], 1) == kept(caches[1], 1)
    assert kept(caches[2], 1) == kept(caches[3], 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("tokens", "left"), [(90, 38), (20, 20)])
def test_pieces_end_with_the_positions_of_the_model(
    tokens: int, left: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(kind, max_position_embeddings=tokens + left), prompt(tokens)
    near, free = (NexusCache(model, KVZIP, residual_length=8) for _ in range(2))
    feed(model, near, ids, tokens)
    monkeypatch.setattr(second_pass, "_PIECE", left)
    model.config.max_position_embeddings = 1024
    feed(model, free, ids, tokens)
    assert all(kept(near, index) == kept(free, index) for index in range(3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("first", [0, 50])
@torch.no_grad()
def test_hardly_any_positions_left(kind: str, first: int) -> None:
    """Expected attention decides, with one warning; also where the caller says where it ends."""
    model, ids = tiny(kind, max_position_embeddings=128), prompt(100 - first)
    positions = torch.arange(first, 100)[None]
    cache = NexusCache(model, KVZIP, residual_length=8)
    other = NexusCache(model, cache.config, scorer="expected_attention")
    with pytest.warns(NexusQuantWarning, match="fewer than 32 of the model's positions"):
        model(ids, position_ids=positions, cache=cache)
    model(ids, position_ids=positions, cache=other)
    for both in (cache, other):  # a second warning would be an error
        model(prompt(24), position_ids=torch.arange(100, 124)[None], cache=both)
    assert kept(cache, 1) == kept(other, 1)


def test_through_generate() -> None:
    model = tiny()
    with nexusquant_evict(model, "high", scorer="kvzip", evict_ratio=0.2) as run:
        out = model.generate(prompt(100), max_new_tokens=5, do_sample=False)
    assert out.shape[1] == 105
    assert run.stats.tokens == 104
    assert run.stats.kept_tokens == pytest.approx(84)


class Received:
    """What kvzip does."""

    second_pass = True

    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.keys[..., 0] if inputs.received is None else inputs.received


@pytest.mark.usefixtures("own_scorers")
def test_registered_scorers_may_ask_for_a_second_pass() -> None:
    register_scorer("received", Received())
    model, caches = tiny(), []
    for scorer in ("kvzip", "received"):
        caches.append(NexusCache(model, KVZIP, scorer=scorer))
        feed(model, caches[-1], prompt(60), 60)
    assert kept(caches[0], 1) == kept(caches[1], 1)
    embedded = model.get_input_embeddings()(prompt(80)).detach()
    with pytest.warns(NexusQuantWarning, match="scorer='received' asks for a second pass"):
        model(inputs_embeds=embedded, cache=NexusCache(model, KVZIP, scorer="received"))


def test_where_no_second_pass_is_possible() -> None:
    model = tiny()
    other = NexusCache(model, KVZIP, scorer="expected_attention")
    feed(model, other, prompt(80), 80)
    mask = torch.ones(80, 80, dtype=torch.bool).tril()[None, None]
    for given, message in (
        ({"inputs_embeds": model.get_input_embeddings()(prompt(80)).detach()}, "without token ids"),
        ({"input_ids": prompt(80), "attention_mask": mask}, "mask does not have two dimensions"),
    ):
        cache = NexusCache(model, KVZIP)
        with pytest.warns(NexusQuantWarning, match=message):
            model(**given, cache=cache)
        assert kept(cache, 1) == kept(other, 1)
    keys, values = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    packed = [
        NexusQuantSimple("balanced", scorer=name).encode(keys, values)
        for name in ("kvzip", "expected_attention")
    ]
    assert packed[0].nbytes == packed[1].nbytes


def test_a_second_pass_that_fails_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    cache = NexusCache(model, KVZIP)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(second_pass, "most_attention", fail)
        with pytest.raises(MemoryError):
            feed(model, cache, prompt(80), 80)
    assert cache.get_seq_length() == 0
    assert all(layer.waiting is None and not layer.repeating for layer in cache.layers)
    feed(model, cache, prompt(80), 80)
    fresh = NexusCache(model, KVZIP)
    feed(model, fresh, prompt(80), 80)
    assert kept(cache, 0) == kept(fresh, 0)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prompt_read_twice_leaves_no_lesser_profile_behind(kind: str) -> None:
    """The residual stream is gone when it is compressed: the profile is built before."""
    more = {"sliding_window": 500} if kind == "gemma3" else {}
    model, other = tiny(kind, **more), tiny(kind, **more)
    twice, once = NexusCache(model, "high", scorer="kvzip"), NexusCache(other, "high")
    feed(model, twice, prompt(600), 600)
    feed(other, once, prompt(600), 600)
    assert twice.profile is not None
    assert once.profile is not None
    assert list(twice.profile.layers) == list(once.profile.layers)
    for index, layer in once.profile.layers.items():
        for side in ("key", "value"):
            mine, theirs = getattr(twice.profile.layers[index], side), getattr(layer, side)
            assert all(torch.equal(vars(mine)[name], x) for name, x in vars(theirs).items())
    for compact in twice.layers:
        assert isinstance(compact.stored.body[0].key_quantizer.basis, Profiled)
