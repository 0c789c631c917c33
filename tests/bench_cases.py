"""What the tests of benchmarks/ start from."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from benchmarks.calibrated import Profiles
from benchmarks.competitors import Prompt
from tests.tiny_checkpoint import LINES, tiny_tokenizer

TEXT = " ".join(f"{line} {number}" for number in range(60) for line in LINES)
HEADS, DIM, LAYERS, TOKENS = 2, 16, 2, 128


def prompt_of(model: LlamaForCausalLM) -> Prompt:
    """A prompt of `TOKENS` random words."""
    ids = torch.randint(2, 320, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return Prompt.of(model, ids)


def profiles_of(model: LlamaForCausalLM) -> Profiles:
    """Calibrated on `TEXT`."""
    return Profiles(model, tiny_tokenizer(), [TEXT], lambda line: None)
