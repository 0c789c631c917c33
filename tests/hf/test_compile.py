"""Compiled models: attention and our hooks stay as they are, the rest is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nexusquant import NexusCache, nexusquant_evict
from tests.hf.models import generate, prompt, step_logits, tiny


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def by_call(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def by_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = (wrapped, by_call, by_forward)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_generate(kind: str, way: Callable[[Any], Any]) -> None:
    settings = {"quality": "balanced", "residual_length": 8, "recent": 4}
    model = tiny(kind)
    with nexusquant_evict(model, **settings) as run:
        plain = generate(model, prompt(60), 20)
    size = run.stats.nbytes
    compiled = way(model)
    with nexusquant_evict(compiled, **settings) as run:
        ours = generate(compiled, prompt(60), 20)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(step_logits(ours), step_logits(plain), rtol=0, atol=1e-4)
    assert run.stats.nbytes == size


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_forward_with_a_cache_compiles_once_per_shape(way: Callable[[Any], Any]) -> None:
    model = tiny(num_hidden_layers=10)
    caches = [NexusCache(model, "balanced") for _ in range(2)]
    steps = [prompt(60), *(prompt(1, seed=i) for i in range(40))]
    plain = [model(ids, cache=caches[0]).logits for ids in steps]
    del caches[0]
    compiled = way(model)
    caches = [NexusCache(compiled, "balanced")]
    graphs = []
    for ids, logits in zip(steps, plain, strict=True):
        ours = compiled(ids, cache=caches[0]).logits
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[-1]  # a prompt, a token
    assert graphs[10] == graphs[-1]  # the cache grows and is compressed; nothing is traced anew


def test_what_it_did_to_the_modules_is_undone() -> None:
    model = tiny()
    compiled = wrapped(model)
    generate(compiled, prompt(3), 1)  # transformers remembers that it is compiled
    before = [set(vars(module)) for module in model.modules()]
    with nexusquant_evict(compiled):
        generate(compiled, prompt(40), 2)
    assert [set(vars(module)) for module in model.modules()] == before
