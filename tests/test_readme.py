"""The README's Python runs, on a tiny model in place of the one it downloads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("own_scorers")
def test_every_python_block_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    text = "the quick brown fox jumps over the lazy dog " * 12
    names = {
        "model": tiny_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "inputs": tokenizer(text, return_tensors="pt"),
        "texts": ["ABCDEFGHIJKLMNOP " + text * 8],
        "K": torch.randn(1, 2, 64, 64),
        "V": torch.randn(1, 2, 64, 64),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        kept = [x for x in block.splitlines() if "from_pretrained" not in x and "open(" not in x]
        exec(compile("\n".join(kept), str(README), "exec"), names)
    assert "smaller than fp16" in capsys.readouterr().out
