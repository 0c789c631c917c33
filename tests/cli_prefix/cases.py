"""How the commands for stored prefixes are tried, and what they should say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexusquant import loading
from tests.test_cli import STORY, run

ASKED = ("--prompt", "the quick brown fox", "--max-new-tokens", 12)


def refused(*args: Any) -> str:
    """What a command says that is refused: one line."""
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert err.splitlines()[-1] == said[0]
    return said[0]


def continued(folder: Path, cache_of: Any) -> str:
    """The text behind the story and what `ASKED` asks, from a cache that holds the story."""
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    more = tokenizer(ASKED[1], return_tensors="pt", add_special_tokens=False).input_ids
    whole = torch.cat([ids, more], 1)
    out = model.generate(
        whole, cache=cache_of(model, ids), max_new_tokens=12, do_sample=False,
        pad_token_id=1,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, whole.shape[1] :], skip_special_tokens=True).strip()) + "\n"
