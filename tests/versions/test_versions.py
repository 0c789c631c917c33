"""What a user does, on twenty model types: the tests that run with every transformers we allow.

`make smoke` runs them with the oldest and with the newest transformers there is.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from nexusquant import CompressionConfig, NexusCache, calibrate, load, nexusquant_evict, save
from nexusquant.hf.cache_names import CACHE_NAMES, cache_argument, generate_cache_name
from nexusquant.versions import TRANSFORMERS
from tests.tiny_checkpoint import tiny_tokenizer
from tests.zoo.builders import build, quiet

TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
    "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "stablelm", "olmo2", "starcoder2",
    "smollm3",
)  # fmt: skip
EACH = pytest.mark.parametrize("model_type", TYPES)
EXACT = CompressionConfig(codec="exact")
NEW = 6
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WINDOWS = ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3",
           "starcoder2", "smollm3")  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is dep:FutureWarning"),  # from 5.24 on
]


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(model_type: str, made: dict[str, Any]) -> Any:
    """One of that type for all tests; with a token to stop at, which early 5.x needs for drafts."""
    if model_type not in made:
        made[model_type] = build(model_type)
        made[model_type].generation_config.eos_token_id = 127
    return made[model_type]


def prompts(tokens: int = 90, pads: int = 0) -> dict[str, Tensor]:
    """Two rows, the second with pads on the left; prompt lookup finds what repeats."""
    ids = torch.randint(3, 100, (2, tokens // 2), generator=torch.Generator().manual_seed(1))
    ids = ids.repeat(1, 2)
    mask = torch.ones_like(ids)
    ids[1, :pads] = mask[1, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one() -> Tensor:
    return prompts()["input_ids"][:1]


def alike(model: Any, inputs: dict[str, Any], **settings: Any) -> None:
    """With exact codes, `generate` gives what it gives without us, by either name of the cache."""
    settings = {**SETTINGS, **settings}
    with quiet():
        stock = model.generate(**inputs, **settings)
        for name in CACHE_NAMES:
            if "num_beams" not in settings:  # its rows are more than the prompt's
                given = {name: NexusCache(model, EXACT)}
                assert torch.equal(model.generate(**inputs, **given, **settings), stock)
        with nexusquant_evict(model, EXACT) as run:
            assert torch.equal(model.generate(**inputs, **settings), stock)
        assert run.stats.tokens


@EACH
def test_padded_batches(model: Any) -> None:
    alike(model, prompts(pads=13))


@EACH
def test_beams(model: Any) -> None:
    alike(model, prompts(pads=7), num_beams=3)


@EACH
def test_prompt_lookup(model: Any) -> None:
    alike(model, {"input_ids": one()}, prompt_lookup_num_tokens=3, max_new_tokens=12)


@EACH
def test_a_block_compresses(model: Any) -> None:
    inputs = prompts(240, pads=13)
    with quiet(), nexusquant_evict(model, quality="high") as run:
        assert model.generate(**inputs, **SETTINGS).shape[0] == 2
    full = run.stats.compressed_layers == run.stats.layers
    assert full or model.config.model_type in WINDOWS
    assert run.stats.compression_ratio > (2.4 if full else 0.9)


@EACH
def test_a_cache_over_two_turns(model: Any) -> None:
    exact, stock = NexusCache(model, EXACT), DynamicCache(config=model.config)
    ids = one()
    name = generate_cache_name()
    with quiet():
        for _ in range(2):
            ours = model.generate(ids, **{name: exact}, **SETTINGS)
            assert torch.equal(ours, model.generate(ids, **{name: stock}, **SETTINGS))
            ids = torch.cat([ours, ids[:, :20]], 1)
        cache = NexusCache(model, quality="high")
        output = model(ids, **cache_argument(model, cache))
        output = model(ids[:, :1], **cache_argument(model, copy.deepcopy(cache)))
    assert output.logits.isfinite().all()
    assert cache.get_seq_length() == ids.shape[1]


@EACH
def test_save_and_load(model: Any, tmp_path: Path) -> None:
    ids = one()
    with torch.no_grad(), quiet():
        cache = NexusCache(model, quality="high")
        model(ids, **cache_argument(model, cache))
        save(cache, tmp_path / "prefix.nxq")
        again = load(tmp_path / "prefix.nxq", model)
        ours, theirs = (
            model(ids[:, :9], **cache_argument(model, x)).logits for x in (again, cache)
        )
    assert torch.equal(ours, theirs)


@EACH
def test_calibrate(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "
    with quiet():
        profile = calibrate(model, WithinVocabulary(tokenizer, 100), [text * 60])
        cache = NexusCache(model, quality="high", profile=profile)
        model(one(), **cache_argument(model, cache))
    assert cache.profile is profile


class WithinVocabulary:
    """A tokenizer for models whose vocabulary is smaller."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.tokenizer(*args, **kwargs)
        out["input_ids"] = out["input_ids"] % self.size
        return out


def test_this_version_is_one_that_we_allow() -> None:
    numbers = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    assert numbers >= tuple(int(x) for x in TRANSFORMERS[0].split(".")[:2])
