"""The same model is recognised in any dtype and on any visit; another one is not."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from nexusquant.hf.fingerprint import fingerprint, fingerprint_of_folder
from tests.hf.models import KINDS, prompt, tiny


def rounded(kind: str = "llama", **changes: Any) -> Any:
    """A model whose weights are bf16 numbers, as those of most checkpoints."""
    return tiny(kind, **changes).to(torch.bfloat16).float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_in_another_dtype_are_the_same_model(kind: str) -> None:
    model = rounded(kind)
    found = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{16}", found)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        assert fingerprint(copy.deepcopy(model).to(dtype)) == found
    assert fingerprint(rounded(kind)) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_fingerprint_of_its_model(kind: str, tmp_path: Path) -> None:
    assert fingerprint_of_folder(tmp_path) is None
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    renamed = kind == "gpt_neox"  # lm_head is called embed_out in its files
    assert fingerprint_of_folder(tmp_path) == (None if renamed else fingerprint(model))
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file)
    assert fingerprint_of_folder(tmp_path) is None


def test_weights_in_full_precision_are_the_same_model_in_bf16() -> None:
    assert fingerprint(tiny().to(torch.bfloat16)) == fingerprint(tiny())


@pytest.fixture
def multimodal() -> Any:
    """A language model whose config is nested in another one."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=tiny("gemma3").config)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
@pytest.mark.parametrize("field", [
    {"pad_token_id": 7}, {"eos_token_id": [3, 4]}, {"image_token_index": 5},
    {"dtype": torch.bfloat16}, {"output_attentions": True}, {"return_dict": False},
    {"id2label": {0: "yes", 1: "no", 2: "?"}}, {"use_cache": False}, {"attention_dropout": 0.1},
    {"temperature": 0.3}, {"_name_or_path": "elsewhere"}, {"field_of_a_later_version": None},
], ids=lambda field: next(iter(field)))  # fmt: skip
def test_fields_that_attention_does_not_read_change_nothing(
    multimodal: Any, field: dict[str, Any], nested: bool
) -> None:
    before = fingerprint(multimodal)
    config = multimodal.config.text_config if nested else multimodal.config
    vars(config).update(field)
    assert fingerprint(multimodal) == before == fingerprint(copy.deepcopy(multimodal))


@pytest.mark.parametrize("field", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"sliding_window": 16},
    {"attn_logit_softcapping": 30.0}, {"query_pre_attn_scalar": 4}, {"rms_norm_eps": 1e-3},
    {"layer_types": ["full_attention"] * 3}, {"max_position_embeddings": 100},
    {"setting_of_an_unknown_model": 2},
], ids=lambda field: next(iter(field)))  # fmt: skip
def test_fields_that_attention_may_read_are_noticed(multimodal: Any, field: dict[str, Any]) -> None:
    """Also after a first look."""
    before = fingerprint(multimodal)
    vars(multimodal.config.text_config).update(field)
    assert fingerprint(copy.deepcopy(multimodal)) == fingerprint(multimodal) != before


def test_use_does_not_change_it() -> None:
    model = tiny()
    found = fingerprint(model)
    model(prompt(10))
    model.config._attn_implementation = "eager"
    model.config.use_cache = False
    model.train()
    assert fingerprint(model) == found
    fresh = tiny("llama", "eager")
    assert fingerprint(fresh) == found


def other_seed() -> Any:
    return tiny(seed=1)


def other_config() -> Any:
    return tiny(rms_norm_eps=1e-3)


def other_rope() -> Any:
    return tiny(rope_parameters={"rope_type": "default", "rope_theta": 500.0})


def other_depth() -> Any:
    return tiny(num_hidden_layers=2)


def one_matrix() -> Any:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.1)
    return model


def one_norm() -> Any:
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.fill_(1.5)
    return model


@pytest.mark.parametrize(
    "build",
    [other_seed, other_config, other_rope, other_depth, one_matrix, one_norm],
    ids=lambda build: build.__name__,
)
def test_other_weights_or_settings_are_another_model(build: Callable[[], Any]) -> None:
    assert fingerprint(build()) != fingerprint(tiny())


def test_weights_loaded_in_place_are_noticed() -> None:
    """A second look is quick, but not blind."""
    model = tiny()
    before = fingerprint(model)
    model.load_state_dict(tiny(seed=3).state_dict())
    assert fingerprint(model) == fingerprint(tiny(seed=3)) != before


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_one_weight_changed_in_place_is_noticed(name: str) -> None:
    model = tiny()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(2)
    assert fingerprint(model) != before


def test_models_are_not_kept_alive() -> None:
    model = tiny()
    fingerprint(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
