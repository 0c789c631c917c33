"""The Python of README and docs/USAGE.md runs, on a tiny model in place of the one downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "USAGE.md"]


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
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            kept = [
                x for x in block.splitlines() if "from_pretrained" not in x and "open(" not in x
            ]
            exec(compile("\n".join(kept), str(page), "exec"), names)
    assert "smaller than fp16" in capsys.readouterr().out


def test_links_lead_somewhere():
    for page in [*PAGES, *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)


def test_the_readme_is_short():
    """A stranger scans one screen or two; the rest is a link away."""
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 90
