"""The speed benchmark: what it measures and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.speed import _exponent, app
from benchmarks.synthetic import RATES, SHARES, random_tiers
from tests.tiny_checkpoint import save_folder


def test_kernels_beside_sdpa_and_memcpy(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    wanted = ["--heads", "2", "--group", "2", "--dim", "64", "--repeat", "3", "--json", str(out)]
    done = CliRunner().invoke(app, ["kernels", "--context", "64", "--context", "256", *wanted])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    rows = {(row["tokens"], row["what"]): row for row in result["rows"]}
    for length in (64, 256):
        fp32, coded = (rows[length, what] for what in ("SDPA fp32", "codes, 2 bits"))
        assert fp32["bytes"] == 2 * 2 * 64 * 4
        assert fp32["of_sdpa"] == 1
        assert coded["bytes"] == pytest.approx(2 * 2 * 64 * 2 / 8 + 2)  # two bits and the gains
        assert rows[length, "memcpy"]["of_memcpy"] == 1
    assert "exponent" in done.output
    assert result["threads"] >= 1


def test_rates_are_those_named() -> None:
    import torch

    keys, values = torch.randn(2, 1, 2, 400, 128)
    for rates in RATES.values():
        parts = random_tiers(keys, values, rates)
        mean = sum(s * r for s, r in zip(SHARES, rates, strict=True))
        size = sum(x.nbytes for p in parts for x in (p.key_rows, p.value_rows))
        assert 8 * size / (2 * keys.numel()) == pytest.approx(mean, rel=0.05)
        assert sum(part.slots.count for part in parts) == 400


def test_exponents() -> None:
    rows = [{"what": "x", "tokens": n, "ms": 3 * n**1.5} for n in (10, 40)]
    assert _exponent(rows, "x") == pytest.approx(1.5)


@pytest.mark.slow
def test_a_model_beside_its_uncompressed_cache(tmp_path: Path) -> None:
    folder, out = save_folder(tmp_path / "tiny"), tmp_path / "model.json"
    wanted = ["--context", "600", "--quality", "high", "--repeat", "1", "--json", str(out)]
    done = CliRunner().invoke(app, ["model", str(folder), *wanted])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["uncompressed", "high"]
    assert rows[0]["step_ratio"] == 1
    assert rows[1]["mean_step_ms"] > 0
