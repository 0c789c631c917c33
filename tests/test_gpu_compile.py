"""The Triton kernels compile for sm_90 without a GPU, no spills in loops, no work done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `tests.gpu_compile` prints, from another process as the interpreter is for this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu_compile"], env=environment, text=True,
        capture_output=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_loop_over_tokens_spills(compiled: Any) -> None:
    spilled = {name: x["stack"] for name, x in compiled["kernels"].items() if x["stack"]}
    assert set(spilled) <= {"merge", "page_queries"}  # once per head, and small
    assert all(size <= 256 for size in spilled.values()), spilled


@pytest.mark.parametrize(
    ("name", "most"), [("logits", 2700), ("values", 2100), ("encode", 3600), ("decode", 2800)]
)
def test_kernels_do_not_grow(compiled: Any, name: str, most: int) -> None:
    assert compiled["kernels"][name]["instructions"] <= most


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bits", ["1", "2", "3", "4"])
def test_instructions_per_element(compiled: Any, side: str, bits: str) -> None:
    """A loop that decoded twice, or for every warp again, would have twice as many.

    Triton 3.6 needs 8.6 to 12.5, Triton 3.9 8.4 to 11.3.
    """
    assert compiled["per_element"][side][bits] <= 13
