"""What people do with models between calls, and the modes of PyTorch they run them in."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import LlamaForCausalLM

from nexusquant import CompressionConfig, NexusCache, UnsupportedError, nexusquant_evict
from tests.hf.models import (
    ATTENTIONS,
    assert_same_run,
    feed,
    generate,
    prompt,
    step_logits,
    tiny,
)
from tests.hf.situation_cases import (
    CODED,
    CODES,
    EXACT,
    FULL_AND_SLIDING,
    HALF,
    SETTINGS,
    close,
    pair,
)

# -- modes of PyTorch


def forget_constants() -> None:
    """Hadamard matrices, code tables and the like are made anew."""
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper:
            home = thing.__module__ or ""
            if home.startswith("nexusquant.") and home != "nexusquant.kernels":
                thing.cache_clear()


@pytest.fixture
def first_of_the_process() -> Iterator[None]:
    """Nothing ran before, and nothing made here is found by others."""
    forget_constants()
    yield
    forget_constants()


@pytest.mark.usefixtures("first_of_the_process")
@pytest.mark.parametrize("same", [True, False], ids=["same_cache", "new_cache"])
def test_inference_mode_comes_first_in_a_process(same: bool) -> None:
    """What is made in inference mode cannot take part in what autograd records."""
    model = tiny()
    cache = NexusCache(model, HALF)
    with torch.inference_mode():
        model(prompt(40), cache=cache)
        model(prompt(3), cache=cache)
    if not same:
        cache = NexusCache(model, HALF)
        model(prompt(40), cache=cache)
    assert model(prompt(12), cache=cache).logits.isfinite().all()


def test_inference_mode_then_no_grad_then_gradients_on_one_cache() -> None:
    model = tiny()
    cache, plain = NexusCache(model, HALF), NexusCache(model, HALF)
    parts = prompt(60)[:, :20], prompt(60)[:, 20:33], prompt(60)[:, 33:]
    expected = [feed(model, plain, part, 60) for part in parts]
    with torch.inference_mode():
        logits = [model(parts[0], cache=cache).logits.clone()]
    with torch.no_grad():
        logits.append(model(parts[1], cache=cache).logits)
    copied = copy.deepcopy(cache)
    logits.append(model(parts[2], cache=cache).logits.detach())
    for ours, stock in zip(logits, expected, strict=True):
        close(ours, stock, 1e-5)
    close(feed(model, copied, parts[2], 60), expected[2], 1e-5)
    assert not any(layer.tail.keys.requires_grad for layer in cache.layers)


@SETTINGS
@FULL_AND_SLIDING
def test_a_loop_that_forgot_no_grad(kind: str, settings: CompressionConfig) -> None:
    model = tiny(kind)
    cache, plain = NexusCache(model, settings), NexusCache(model, settings)
    ids = prompt(60)
    for part in ids[:, :40], *ids[:, 40:].split(1, 1):
        logits = model(part, cache=cache).logits
        close(logits.detach(), feed(model, plain, part, 40), 1e-5)
    assert cache.nbytes == plain.nbytes


def test_gradient_checkpointing_is_of_no_account_in_eval_mode() -> None:
    model = tiny()
    stock = generate(model, prompt(40), 12)
    with warnings.catch_warnings():  # another name in later 5.x
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    with nexusquant_evict(model, EXACT) as run:
        assert_same_run(generate(model, prompt(40), 12), stock)
    assert run.stats.compressed_layers == 3


@FULL_AND_SLIDING
def test_autocast_with_exact_codec_stays_within_its_rounding(kind: str) -> None:
    model, ids = tiny(kind), prompt(60)
    cache, stock = pair(model)
    truth = feed(model, None, ids, 60)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch.cat([feed(model, stock, part, 60) for part in ids.split(20, 1)], 1)
        ours = torch.cat([feed(model, cache, part, 60) for part in ids.split(20, 1)], 1)
    error = (theirs - truth).square().mean().sqrt()
    assert (ours - truth).square().mean().sqrt() <= 2 * error


@pytest.mark.parametrize("codec", ["exact", "e8"])
@FULL_AND_SLIDING
def test_autocast_with_codes_and_eviction(kind: str, codec: str) -> None:
    model = tiny(kind)
    cache = NexusCache(model, HALF, codec=codec)
    with torch.autocast("cpu", torch.bfloat16):
        coded = generate(model, prompt(40), 12, cache=cache)
    assert step_logits(coded).isfinite().all()


@FULL_AND_SLIDING
def test_autocast_around_a_cache_changes_no_arithmetic_of_ours(kind: str) -> None:
    """Keys and values in bf16 either way; the codes must not be coarser for it."""
    model = tiny(kind).to(torch.bfloat16)
    settings = CODED.replace(tiers=(), key_bits=8, value_bits=8)
    caches, logits = [NexusCache(model, settings) for _ in range(2)], []
    for cache, on in zip(caches, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            feed(model, cache, prompt(40), 40)
        logits.append(feed(model, cache, prompt(9), 9).float())
    close(*logits, 1e-2)


# -- models that change or share


@CODES
def test_to_bf16_and_back_between_calls(settings: CompressionConfig) -> None:
    model = tiny().to(torch.bfloat16).float()  # so that the way back loses nothing
    before = generate(model, prompt(460), 12, cache=NexusCache(model, settings))
    again = generate(model, prompt(460), 12, cache=NexusCache(model, settings))
    model.to(torch.bfloat16)
    small = generate(model, prompt(460), 12, cache=NexusCache(model, settings))
    assert step_logits(small).isfinite().all()
    model.float()
    back = generate(model, prompt(460), 12, cache=NexusCache(model, settings))
    assert_same_run(back, again, 0)
    assert before.sequences.shape == back.sequences.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@SETTINGS
def test_a_live_cache_in_a_model_of_another_dtype(settings: Any, dtype: torch.dtype) -> None:
    """Right, within rounding, or refused; and then it can go on as before."""
    model = tiny().to(dtype).float()
    cache, plain = NexusCache(model, settings), NexusCache(model, settings)
    for each in (cache, plain):
        feed(model, each, prompt(40), 40)
        feed(model, each, prompt(3), 3)
    expected = feed(model, plain, prompt(12, seed=2), 12)
    model.to(dtype)
    try:
        close(feed(model, copy.deepcopy(cache), prompt(12, seed=2), 12).float(), expected, 0.1)
    except (UnsupportedError, RuntimeError):
        with pytest.raises((UnsupportedError, RuntimeError), match="dtype"):
            feed(model, cache, prompt(12, seed=2), 12)
        assert cache.get_seq_length() == 43
    model.float()
    assert torch.equal(feed(model, cache, prompt(12, seed=2), 12), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_models_that_share_a_config(attention: str) -> None:
    one = tiny("llama", attention)
    torch.manual_seed(5)
    two = LlamaForCausalLM(one.config).eval()
    assert one.config is two.config
    stock = [generate(model, prompt(40), 12) for model in (one, two)]
    with nexusquant_evict(one, EXACT) as run:
        ours = generate(one, prompt(40), 12)
        plain = generate(two, prompt(40), 12)
        with nexusquant_evict(two, EXACT):
            assert_same_run(generate(two, prompt(40), 12), stock[1])
        cache = NexusCache(two, EXACT)
    assert run.stats.compressed_layers == 3
    assert_same_run(ours, stock[0])
    assert_same_run(plain, stock[1], 0)
    assert_same_run(generate(two, prompt(40), 12, cache=cache), stock[1])
    assert_same_run(generate(one, prompt(40), 12), stock[0], 0)
    del cache, ours  # both keep the model's attention routed to us
    gc.collect()
    assert one.config._attn_implementation == attention


def offloaded(how: str, folder: Path) -> Any:
    model = tiny()
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("how", ["cpu", "disk", "some"])
def test_offloaded_weights(how: str, tmp_path: Path) -> None:
    plain, model = tiny(), offloaded(how, tmp_path)
    with nexusquant_evict(model, EXACT) as run:
        assert_same_run(generate(model, prompt(40), 12), generate(plain, prompt(40), 12))
    assert run.stats.compressed_layers == 3
    caches = NexusCache(model, HALF), NexusCache(plain, HALF)
    coded = [
        generate(each, prompt(40), 12, cache=cache)
        for each, cache in zip((model, plain), caches, strict=True)
    ]
    assert_same_run(*coded)
    assert caches[0].nbytes == caches[1].nbytes
    cache = NexusCache(model, HALF)  # an output projection that is not there is not measured
    assert step_logits(generate(model, prompt(460), 12, cache=cache)).isfinite().all()
    assert cache.profile is not None
    assert cache.profile.complete


@SETTINGS
@FULL_AND_SLIDING
def test_the_inner_model_with_a_cache(kind: str, settings: CompressionConfig) -> None:
    model = tiny(kind)
    caches = NexusCache(model, settings), NexusCache(model, settings)
    ids = prompt(60)
    with torch.no_grad():
        for part in ids[:, :30], ids[:, 30:50], *ids[:, 50:].split(1, 1):
            inner = model.model(part, cache=caches[0]).last_hidden_state
            logits = model(part, cache=caches[1]).logits
            close(model.lm_head(inner), logits, 1e-4)
    assert caches[0].nbytes == caches[1].nbytes
