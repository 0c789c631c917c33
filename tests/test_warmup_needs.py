"""What kernels a model needs, what is said about compiling them, and where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, MambaConfig
from typer.testing import CliRunner

import nexusquant
from nexusquant.cli import app
from nexusquant.hf.kernels import query_groups
from nexusquant.kernels import use_operator
from nexusquant.kernels import warmup as ahead
from nexusquant.kernels.warmup import Warmth, state, warm_up
from nexusquant.progress import compile_kernels, progress_steps
from tests.kernel_cases import FAST
from tests.tiny_checkpoint import tiny_model

pytestmark = pytest.mark.skipif("numba" not in FAST, reason="needs Numba, an optional extra")
SOURCE = Path(nexusquant.__file__).parent


def test_without_numba_there_is_nothing_to_do() -> None:
    before = use_operator("reference")
    try:
        assert warm_up([4]) == state([4]) == Warmth((), 0, 0.0, None)
    finally:
        use_operator(before)


@pytest.mark.parametrize(
    ("model_type", "settings", "groups"),
    [
        (
            "llama",
            {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
            [3],
        ),
        ("qwen2", {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}, [7]),
        ("gpt2", {}, [1]),
        ("falcon", {"multi_query": True, "num_attention_heads": 71, "hidden_size": 4544}, [71]),
        ("bloom", {}, []),  # decoded for each pass
        ("deepseek_v3", {}, []),
    ],
)
def test_what_a_model_needs(model_type: str, settings: Any, groups: list[int]) -> None:
    assert query_groups(AutoConfig.for_model(model_type, **settings)) == groups


def test_what_numbers_of_queries_need() -> None:
    from nexusquant.kernels.cpu import attend
    from nexusquant.kernels.cpu.warmup import needed

    def names(*groups: int) -> list[str]:
        return [one.name for one in needed(groups, False) if one.name.startswith("attend")]

    assert names(3) == ["attend-3"]
    assert names(7, 1) == ["attend-1", "attend-8"]
    assert names(71) == []
    everything = needed(None, True)
    assert len(everything) == len({one.name for one in everything}) == 5 + len(attend.ROWS) + 4


def test_the_line_about_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiling(groups: Any, storage: bool, progress: Any) -> Warmth:
        for done in range(3):
            progress(done, 3, "x")
        return Warmth(("x",) * 3, 7, 2.34, "folder")

    monkeypatch.setattr(ahead, "warm_up", compiling)
    with progress_steps() as progress:
        line = compile_kernels(progress, tiny_model(320))
    assert line == "compiling kernels took 2.3 s, once on this machine"
    assert capsys.readouterr().err == "compiling kernels for this CPU, once: 1 of 3\n"
    monkeypatch.setattr(ahead, "warm_up", lambda *_: Warmth((), 7, 0.0, "folder"))
    with progress_steps() as progress:
        assert compile_kernels(progress, tiny_model(320)) == ""
    assert capsys.readouterr().err == ""


def test_warm_up_of_a_model_that_cannot_be_compressed(tmp_path: Path) -> None:
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["warmup", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no attention layers" in " ".join(result.output.split())
