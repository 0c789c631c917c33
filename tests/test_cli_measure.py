"""`nexusquant evaluate`: retrieval, long decoding and the JSON file, on a tiny random model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nexusquant import evaluate
from nexusquant.accounting import CacheStats
from nexusquant.cli import app
from nexusquant.cli.record import as_json
from nexusquant.cli.tables import drift_table, needle_table
from nexusquant.config import PRESETS

STATS = CacheStats(100, 400, 10, 8.0, 2, 2, 0)
SMALL = ("--prefix", "64", "--continuation", "16", "--quality", "high", "--quality", "max")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("the lazy dog packs my box with five dozen liquor jugs. " * 40)
    return file


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def rendered(table: object) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_everything_is_shown_and_written(folder: Path, story: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    status, out, err = run(
        folder, "--text", story, *SMALL, "--decode", "3", "--drift", "40", "--needles",
        "--lengths", "250,300", "--depths", "0.2,0.8", "--rounds", "1", "--json", file,
    )  # fmt: skip
    assert status == 0, err
    assert f"{story}: KL along 40 tokens decoded one by one behind 64" in out
    assert "36-40" in out
    assert "high: share of the hidden codes" in out
    assert "codes: 300 tokens, max, prefix 1 of 1" in err
    assert "max, decoding 40 tokens" in err

    found = json.loads(file.read_text())
    assert found["configs"]["max"]["evict_ratio"] == PRESETS["max"].evict_ratio
    assert [row["quality"] for row in found["divergence"]] == ["high", "max"]
    assert [row["quality"] for row in found["decoding"]] == ["uncompressed", "high", "max"]
    kl = found["divergence"][1]["result"]["kl"]
    assert f"{kl:.4f}" in out
    drift = found["drift"][1]
    assert (drift["quality"], drift["text"]) == ("max", str(story))
    assert len(drift["result"]["buckets"]) == 8
    assert f"{drift['result']['slope']:.2f}" in out
    assert drift["result"]["after_steps"]["compression_ratio"] > 1
    cells = found["needles"][0]["result"]["cells"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [
        (250, 0.2), (250, 0.8), (300, 0.2), (300, 0.8),
    ]  # fmt: skip


def test_without_options_only_divergence_is_measured(
    folder: Path, story: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    status, out, _ = run(folder, "--text", story, *SMALL, "--json", file)
    assert status == 0
    assert "hidden codes" not in out
    assert "one by one" not in out
    found = json.loads(file.read_text())
    assert (found["decoding"], found["drift"], found["needles"]) == ([], [], [])
    assert found["model"] == str(folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--lengths", "1k"), "--lengths 1k: must be numbers with commas between them"),
        (("--depths", "0.1,"), "--depths 0.1,: must be numbers"),
        (("--needles", "--lengths", "160", "--depths", "2"), "depths=[2.0]: must be 1 to 12"),
        (("--needles", "--lengths", "90000"), "tokens are fewer than --lengths 90000"),
        (("--needles", "--lengths", "60", "--depths", "0.5"), "length 60: 1 needles take"),
        (("--drift", "90000"), "tokens are fewer than --prefix 64 + --drift 90000"),
        (("--drift", "1"), "--drift 1: needs at least 2"),
        (("--json", "no such folder/out.json"), "must be a file in a folder that exists"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(
    folder: Path, story: Path, args: tuple[str, ...], message: str
) -> None:
    status, out, err = run(folder, "--text", story, *SMALL, *args)
    assert (status, out) == (2, "")
    assert message in err
    assert ": high" not in err


def test_more_tokens_than_positions_is_said(folder: Path, story: Path) -> None:
    needles = ("--needles", "--lengths", "520", "--depths", "0.5", "--rounds", "1")
    _, _, err = run(folder, "--text", story, *SMALL[:-2], *needles)
    assert err.count("warning") == 1
    assert "--lengths 520 is more than the 512 tokens this model was made for" in err


def test_needle_table_lines_up_and_marks_what_nobody_knows() -> None:
    cells = (
        evaluate.NeedleCell(1024, 0.5, 6, 4, 3),
        evaluate.NeedleCell(1024, 0.1, 6, 0, 0),
        evaluate.NeedleCell(16384, 0.5, 6, 6, 6),
        evaluate.NeedleCell(16384, 0.1, 6, 5, 0),
    )
    grid = evaluate.NeedleGrid("max", cells, {1024: 33.04, 16384: 34.0})
    lines = rendered(needle_table(grid))
    assert len({len(line) for line in lines}) == 1
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["0.10", "-", "0.00"], ["0.50", "0.75", "1.00"],
        ["all", "0.75", "0.55"], ["known", "4 of 12", "11 of 12"],
    ]  # fmt: skip
    assert "16,384" in lines[1]
    assert "33.0x" in lines[2]


def test_drift_table_lines_up() -> None:
    buckets = tuple(evaluate.DriftBucket(i * 250, i * 250 + 250, 0.1 + i, 0.1) for i in range(8))
    drift = evaluate.Drift(buckets, STATS, STATS)
    presets = [(name, drift) for name in evaluate.DEFAULT_PRESETS]
    lines = rendered(drift_table(presets))
    assert len({len(line) for line in lines}) == 1
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows[7] == ["1,751-2,000", *["7.1000"] * 4]
    assert rows[8] == ["last / first", *["71.00"] * 4]
    assert rows[-3][1:] == ["1.00"] * 4
    assert rows[-1] == ["ratio at the end", *["8.00"] * 4]


def test_json_has_derived_figures_and_no_nan() -> None:
    cell = evaluate.NeedleCell(1024, 0.5, 6, 0, 0)
    assert as_json(cell) == {
        "length": 1024, "depth": 0.5, "asked": 6, "known": 0, "kept": 0, "share": None,
    }  # fmt: skip
    assert as_json({1: [STATS]})["1"][0]["compression_ratio"] == 8
