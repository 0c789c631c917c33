"""The benchmark of the storage codec: what it measures and what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.storage_speed import app
from tests.tiny_checkpoint import save_folder


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark uses one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("real", [False, True])
def test_codec_beside_zstd_and_int8(tmp_path: Path, real: bool) -> None:
    out = tmp_path / "out.json"
    few = ["--layers", "2", "--tokens", "200", "--heads", "2", "--dim", "16", "--repeat", "1"]
    what = ["--model", str(save_folder(tmp_path / "tiny"))] if real else []
    done = CliRunner().invoke(app, [*what, *few, "--bits", "2", "--bits", "4", "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 6
    assert rows["fp16, zstd 3"]["bits"] < 16.5
    assert 6 < rows["int8, zstd 3"]["bits"] < 9.5
    for bits in (2, 4):
        for way in (f"codec, {bits} bits", f"codec, {bits} bits, own steps"):
            assert rows[way]["bits"] == pytest.approx(bits, rel=0.25)
            assert way in done.output
    assert all(row[key] > 0 for row in rows.values() for key in ("encode", "decode"))
