"""Bad numbers, errors and interrupts half way, odd shapes: clear errors, and the cache goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from nexusquant import CompressionConfig, NexusCache, NonFiniteError, nexusquant_evict
from nexusquant.config import PRESETS
from tests.hf.models import (
    ATTENTIONS,
    assert_same_run,
    feed,
    generate,
    prompt,
    step_logits,
    tiny,
)
from tests.hf.situation_cases import CODED, CODES, EXACT, FULL_AND_SLIDING, HALF, SETTINGS


def twins(model: Any, settings: CompressionConfig, first: int = 40) -> tuple[NexusCache, ...]:
    """Two caches with the same content."""
    caches = NexusCache(model, settings), NexusCache(model, settings)
    for cache in caches:
        if first:
            feed(model, cache, prompt(first), first)
    return caches


def go_on_alike(model: Any, caches: tuple[NexusCache, ...]) -> None:
    """A turn, some steps and another turn."""
    for begin, step in ((0, 20), (20, 1), (32, 20)):
        ids = prompt(52, seed=6)[:, begin : begin + 20 if step > 1 else 32]
        assert torch.equal(*(feed(model, cache, ids, step) for cache in caches))
    assert caches[0].nbytes == caches[1].nbytes


# -- bad numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["k_proj", "v_proj"])
@pytest.mark.parametrize(("first", "step"), [(0, 20), (40, 20), (40, 1)])
@CODES
def test_bad_weights_are_named_and_the_cache_goes_on_without(
    settings: CompressionConfig, first: int, step: int, weight: str, bad: float
) -> None:
    """In a first prompt, in a later one, and in decoding, where the block they are in tells."""
    model = tiny()
    broken, sound = twins(model, settings, first)
    parameter = getattr(model.model.layers[1].self_attn, weight).weight
    good = parameter.data.clone()
    parameter.data[3] = bad
    parts = prompt(20, seed=5).split(step, 1)
    length = 0

    def feed_until_it_is_noticed() -> None:
        nonlocal length
        for part in parts:
            feed(model, broken, part, step)
            length += step

    with pytest.raises(NonFiniteError, match="layer 1"):
        feed_until_it_is_noticed()
    parameter.data.copy_(good)
    assert broken.get_seq_length() == first + length
    assert len({layer.get_seq_length() for layer in broken.layers}) == 1
    broken.crop(-length)  # what was not compressed can be taken back
    go_on_alike(model, (broken, sound))


@pytest.mark.parametrize("side", ["k_proj", "v_proj"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e37), (torch.float16, 6e4)]
)
@SETTINGS
def test_enormous_keys_and_values(
    settings: Any, dtype: torch.dtype, size: float, side: str
) -> None:
    """Finite, as far as stock is; or an error that names the layer."""
    model = tiny()
    seen: list[Tensor] = []
    projection = getattr(model.model.layers[1].self_attn, side)
    handle = projection.register_forward_hook(lambda m, a, out: seen.append(out.abs().max()))
    feed(model, None, prompt(100), 100)
    handle.remove()
    projection.weight.data *= size / float(seen[0]) / 2
    model.to(dtype)
    stock = DynamicCache(config=model.config)
    wanted = [feed(model, stock, part, 40) for part in prompt(100).split(40, 1)]
    cache = NexusCache(model, settings)
    try:
        logits = [feed(model, cache, part, 40) for part in prompt(100).split(40, 1)]
    except NonFiniteError as error:
        message = str(error)
    else:
        message = ""
        for ours, theirs in zip(logits, wanted, strict=True):
            assert ours.isfinite().all() or not theirs.isfinite().all()
    assert "layer" in message or not message


def test_rows_of_nothing_but_padding_stay_finite() -> None:
    """And the other rows are not touched by them."""
    model = tiny()
    for settings in (EXACT, CODED, HALF):
        both, alone = NexusCache(model, settings), NexusCache(model, settings)
        for length in (40, 12, 1):
            now = prompt(length, batch=3, seed=length)
            seen = torch.ones(3, both.get_seq_length() + length, dtype=torch.long)
            seen[1] = 0
            with torch.no_grad():
                out = model(now, attention_mask=seen, cache=both).logits
            assert out.isfinite().all()
            other = feed(model, alone, now[[0, 2]], length)
            torch.testing.assert_close(out[[0, 2]], other, rtol=0, atol=1e-4)


# -- odd lengths


@pytest.mark.parametrize("quality", sorted(PRESETS))
@FULL_AND_SLIDING
def test_one_token_then_seventy(kind: str, quality: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, quality)
    logits = torch.cat([feed(model, cache, prompt(1), 1), feed(model, cache, prompt(70), 1)], 1)
    stock = feed(model, None, torch.cat([prompt(1), prompt(70)], 1), 71)
    assert logits.isfinite().all()
    exact = 32 if kind == "llama" else 23  # a window holds no more
    torch.testing.assert_close(logits[:, :exact], stock[:, :exact], rtol=0, atol=1e-4)
    stats = cache.stats()
    assert stats.tokens == 71
    assert stats.compressed_layers >= 1
    assert stats.bits_per_element < 32


@pytest.mark.parametrize("step", [60, 1], ids=["prompt", "decoding"])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_one_token_again_and_again_can_be_coded(share: float, step: int) -> None:
    """Layer 0 has the same value for each of them, and without RoPE the same key."""
    model, generator = tiny(), torch.Generator().manual_seed(0)
    for settings in (CODED, CompressionConfig()):
        ids = torch.where(torch.rand(1, 60, generator=generator) < share, 7, prompt(60))
        cache = NexusCache(model, settings)
        feed(model, cache, ids, step)
        ours, stock = feed(model, cache, prompt(5), 5), feed(model, None, ids, 60)
        assert ours.isfinite().all()
        assert stock.isfinite().all()


@FULL_AND_SLIDING
def test_a_rope_model_beyond_its_positions_is_as_stock(kind: str) -> None:
    model = tiny(kind, max_position_embeddings=64)
    stock = generate(model, prompt(100), 12)
    with nexusquant_evict(model, EXACT):
        assert_same_run(generate(model, prompt(100), 12), stock)
    for settings in (CODED, HALF, CODED.replace(scorer="kvzip", evict_ratio=0.3)):
        with pytest.MonkeyPatch.context() as patch, nexusquant_evict(model, settings) as run:
            patch.setattr("nexusquant.hf.notices.warnings.warn", lambda *_, **__: None)
            assert step_logits(generate(model, prompt(100), 12)).isfinite().all()
        assert run.stats.tokens == 111


@SETTINGS
def test_gpt2_beyond_its_positions_fails_as_stock_and_changes_nothing(settings: Any) -> None:
    model = tiny("gpt2", max_position_embeddings=64)
    caches = twins(model, settings)
    stock = DynamicCache(config=model.config)
    feed(model, stock, prompt(40), 40)
    with pytest.raises(IndexError) as theirs:
        feed(model, stock, prompt(30), 30)
    with pytest.raises(IndexError) as ours:
        feed(model, caches[0], prompt(30), 30)
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(*(feed(model, cache, prompt(12), 12) for cache in caches))
    assert caches[0].nbytes == caches[1].nbytes


# -- errors half way

ERRORS: list[BaseException] = [MemoryError(), torch.OutOfMemoryError("full"), KeyboardInterrupt()]


class Once:
    """Raises at the first call."""

    def __init__(self, error: BaseException, original: Callable[..., Any]) -> None:
        self.error: BaseException | None = error
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.original(*args, **kwargs)


def both(models: tuple[Any, ...], caches: tuple[NexusCache, ...], ids: Tensor) -> None:
    """The same in two equal models."""
    ours, other = (feed(m, c, ids, ids.shape[1]) for m, c in zip(models, caches, strict=True))
    assert torch.equal(ours, other)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("where", ["mlp", "o_proj"])
def test_out_of_memory_or_interrupted_then_tried_again(
    where: str, first: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny(), tiny()  # a prompt may build the model's profile
    caches = tuple(NexusCache(model, HALF) for model in models)
    if first:
        both(models, caches, prompt(first))
    layer = models[0].model.layers[1]
    module = layer.self_attn.o_proj if where == "o_proj" else layer.mlp
    for tokens in (500, 1):  # a prefill, which may build a profile; a decoding step
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", Once(error, module.forward))
            with pytest.raises(type(error)):
                feed(models[0], caches[0], prompt(tokens, seed=2), tokens)
        both(models, caches, prompt(tokens, seed=2))
    for length in (20, 1, 30):
        both(models, caches, prompt(length, seed=length))
    assert caches[0].nbytes == caches[1].nbytes
    assert not any(isinstance(x, Once) for x in vars(module).values())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_interrupted_in_a_block_then_tried_again(
    attention: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", attention)
    with nexusquant_evict(model, HALF):
        expected = generate(model, prompt(60), 20)
        mlp = model.model.layers[1].mlp
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "forward", Once(error, mlp.forward))
            with pytest.raises(type(error)):
                generate(model, prompt(60), 20)
        assert_same_run(generate(model, prompt(60), 20), expected, 0)
    generate(model, prompt(60), 2)


def attention_functions() -> list[tuple[ModuleType | type, str, str]]:
    return [
        (torch.nn.functional, "scaled_dot_product_attention", "sdpa"),
        (modeling_llama, "eager_attention_forward", "eager"),
    ]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("home", "name", "attention"), attention_functions())
def test_an_error_inside_the_exact_attention_function(
    home: Any, name: str, attention: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", attention)
    caches = twins(model, HALF, 0)
    for ids in (prompt(40), prompt(5)):
        with monkeypatch.context() as patch:
            patch.setattr(home, name, Once(error, getattr(home, name)))
            if caches[0].get_seq_length() == 0:
                with pytest.raises(type(error)):
                    feed(model, caches[0], ids, 40)
        assert torch.equal(*(feed(model, cache, ids, 40) for cache in caches))
    go_on_alike(model, caches)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    "what", ["hf.attention.attend", "hf.compressing.compress", "compressor._scores"]
)
def test_an_error_inside_our_own_arithmetic(
    what: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    caches = twins(model, HALF)
    home, _, name = f"nexusquant.{what}".rpartition(".")
    with monkeypatch.context() as patch:
        module = __import__(home, fromlist=[name])
        patch.setattr(module, name, Once(error, getattr(module, name)))
        with pytest.raises(type(error)):
            feed(model, caches[0], prompt(20, seed=2), 20)
    assert torch.equal(*(feed(model, cache, prompt(20, seed=2), 20) for cache in caches))
    go_on_alike(model, caches)
