"""What a block could leave behind on a model or in transformers' registries."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tests.hf.models import prompt


class State:
    """Everything the block could have touched, with the outputs."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys = {name: set(vars(module)) for name, module in model.named_modules()}
        self.hooks = self._hooks()
        self.attention = model.config._attn_implementation
        self.config = model.config.to_dict()
        for name in ("architectures", "dtype"):  # save_pretrained fills them in
            self.config.pop(name)
        self.mappings = [
            dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)
        ]
        with torch.no_grad():
            self.logits = model(prompt(30)).logits

    def _hooks(self) -> list[list[Any]]:
        return [
            [
                *m._forward_pre_hooks.values(),
                *m._forward_hooks.values(),
                *m._forward_pre_hooks_with_kwargs,
                *m._forward_hooks_always_called,
            ]
            for m in self.model.modules()
        ]

    def assert_restored(self) -> None:
        now = State(self.model)
        assert now.keys == self.keys
        assert now.hooks == self.hooks
        assert now.attention == self.attention
        assert now.config == self.config
        for before, after in zip(self.mappings, now.mappings, strict=True):
            assert before.keys() == after.keys()
            assert all(before[name] is after[name] for name in before)
        assert torch.equal(now.logits, self.logits)
