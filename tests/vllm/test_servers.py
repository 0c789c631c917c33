"""Two HTTP servers, one producing and one consuming, with one Redis: the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine import BLOCK, ENVIRONMENT, ROOT

SCRIPT = ROOT / "examples" / "disaggregated_prefill.py"


@pytest.mark.parametrize("codec", ["raw", "e8", "entropy"])
def test_one_produces_and_one_consumes(codec: str, model: Path, profile: Path) -> None:
    options = ["--profile", str(profile)] if codec == "entropy" else []
    told = example("--codec", codec, "--model", str(model), *options)
    decode, prefill = told["decode"], told["prefill_alone"]
    whole = (decode["prompt"] - 1) // BLOCK * BLOCK
    assert decode["cached"] == whole > 500
    assert told["alone"]["cached"] == 0, "nobody has read this one"
    assert decode["text"] == prefill["text"]
    consumer, producer = told["metrics"]["decode"], told["metrics"]["prefill"]
    assert consumer["vllm:external_prefix_cache_hits_total"] >= whole
    assert consumer["vllm:nexusquant_loaded_blocks_total"] >= whole // BLOCK
    assert consumer["vllm:nexusquant_saved_blocks_total"] == 0
    assert producer["vllm:nexusquant_loaded_blocks_total"] == 0
    assert producer["vllm:nexusquant_saved_bytes_total"] == told["redis_bytes"]


def example(*arguments: str) -> Any:
    """What the script prints as JSON."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])
