"""The GPU benchmark, small and under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from tests.kernel_cases import INTERPRETED

pytest.importorskip("triton", minversion=INTERPRETED)

from benchmarks import gpu
from benchmarks.gpu import Shape


def test_attention_beside_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "L2_BYTES", 1 << 20)
    rows = gpu.attention(Shape(1, 130, heads=1, group=2, dim=32), 1, gpu.bandwidth(1))
    assert [row["what"] for row in rows][:1] == ["SDPA fp16"]
    assert [row["what"] for row in rows][-3:] == ["codes, lossless", "codes, high", "codes, 2 bits"]
    assert rows[0]["of_sdpa"] == 1
    assert rows[0]["bytes"] == 2 * 130 * 32 * 2
    assert rows[-1]["bytes"] == pytest.approx(2 * 130 * 32 / 4 + 130, rel=0.2)  # slots beside


def test_encoding_a_prefill() -> None:
    took = gpu.encode_prefill(1, Shape(1, 40, heads=1, dim=32), 1)
    assert took["kernels"] > 0
    assert took["as called"] > 0


@pytest.mark.slow
def test_its_checks_pass() -> None:
    assert max(gpu.check(300).values()) < 0.03


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu.app, [])
    assert done.exit_code == 2
    assert "needs a CUDA device" in done.output
