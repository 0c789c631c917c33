"""A cache goes to another process and on with its model there."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant import NexusCache, UnsupportedError, attach, nexusquant_evict
from tests.hf.models import generate, prompt, tiny
from tests.zoo.builders import build


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, cache=cache).logits
    return logits


def sent(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("quality", ["lossless", "balanced"])
@pytest.mark.parametrize("tokens", [0, 5, 60, 500])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_an_attached_cache_goes_on_as_the_first(kind: str, tokens: int, quality: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, quality)
    if tokens:
        feed(model, cache, prompt(tokens))
    again = sent(cache)
    assert again.nbytes == cache.nbytes
    attach(again, model)
    for count in (3, 40, 1):
        assert torch.equal(*(feed(model, each, prompt(count)) for each in (cache, again)))
    assert (again.profile is None) == (cache.profile is None)


def test_a_hybrid_model_through_torch_save() -> None:
    model = build("falcon_h1")
    cache = NexusCache(model)
    feed(model, cache, prompt(60))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    attach(again, model)
    assert torch.equal(*(feed(model, each, prompt(5)) for each in (cache, again)))


def test_the_cache_of_a_block_goes_on_in_another_block() -> None:
    model = tiny()
    with nexusquant_evict(model, "balanced"):
        first = generate(model, prompt(60), 5)
    again = sent(first.cache)
    with nexusquant_evict(model, "balanced"):
        turn = torch.cat([first.sequences, prompt(9)], 1)
        mine = generate(model, turn, 5, cache=again)
        theirs = generate(model, turn, 5, cache=first.cache)
    assert torch.equal(mine.sequences, theirs.sequences)


def test_sent_in_the_middle_of_drafts() -> None:
    model = tiny()
    cache = NexusCache(model, residual_length=8, recent=4)
    cache.activate_past_recording()
    feed(model, cache, prompt(40))
    again = sent(cache)
    attach(again, model)
    for each in (cache, again):
        each.crop(-2)
    assert torch.equal(*(feed(model, each, prompt(5)) for each in (cache, again)))


def test_without_a_model_it_refuses_and_stays_as_it_is() -> None:
    model = tiny()
    cache = NexusCache(model)
    feed(model, cache, prompt(60))
    again = sent(sent(cache))
    with pytest.raises(UnsupportedError, match=r"nexusquant\.attach"):
        feed(model, again, prompt(1))
    assert again.get_seq_length() == 60
    twin = copy.deepcopy(again)
    for each in (again, twin):
        attach(each, model)
        attach(each, model)  # once is enough
    assert torch.equal(*(feed(model, each, prompt(5)) for each in (again, twin)))


def test_another_model_is_refused() -> None:
    cache = sent(NexusCache(tiny()))
    with pytest.raises(UnsupportedError, match="another model"):
        attach(cache, tiny(seed=1))
    with pytest.raises(UnsupportedError, match="expected a compressed cache, got DynamicCache"):
        attach(DynamicCache(), tiny())
    with pytest.raises(UnsupportedError, match="expected a transformers model"):
        attach(cache, torch.nn.Linear(1, 1))


def test_an_empty_cache_builds_its_profile_where_it_arrives() -> None:
    model = tiny()
    again = sent(NexusCache(model))
    attach(again, model)
    feed(model, again, prompt(500))
    assert again.profile is not None
