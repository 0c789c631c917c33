"""The tiny models are tiny, all there, and generate."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo.builders import UNBUILT, ZOO, build, quiet

SAMPLE = ("bart", "deepseek_v3", "falcon_h1", "gemma4_text", "gpt2", "llama")
NEW_TOKENS = 6
MOST_PARAMETERS = 3_000_000


def padded_prompts() -> tuple[Tensor, Tensor]:
    """(2, 80) tokens and their mask; the second prompt has 13 pads on the left."""
    input_ids = torch.randint(3, 100, (2, 80), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, :13] = 0
    attention_mask[1, :13] = 0
    return input_ids, attention_mask


def generated_logits(model: PreTrainedModel) -> Tensor:
    """(tokens, batch, vocabulary) logits of a greedy continuation."""
    input_ids, attention_mask = padded_prompts()
    with torch.no_grad(), quiet():
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.stack(output.logits)


def check_tiny_and_generates(model_type: str) -> None:
    """Within bounds, and its logits are finite and differ."""
    model = build(model_type)
    assert not model.training
    assert model.num_parameters() < MOST_PARAMETERS
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = generated_logits(model)
    assert len(logits) == NEW_TOKENS
    assert logits.isfinite().all()
    assert logits.std() > 0.01


@pytest.mark.parametrize("model_type", SAMPLE)
def test_tiny_model_generates(model_type: str) -> None:
    check_tiny_and_generates(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(ZOO) - set(SAMPLE)))
def test_every_tiny_model_generates(model_type: str) -> None:
    check_tiny_and_generates(model_type)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (build("llama", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the tables are for 5.23.0")
def test_zoo_covers_the_mapping() -> None:
    assert set(ZOO) | set(UNBUILT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(ZOO) & set(UNBUILT)
