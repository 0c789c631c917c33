"""The run with other versions: what it says, and when it fails."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.versions import environments

HERE = version("transformers")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package index whose newest release is what a test says, and pytest's exit status there."""

    def offer(newest: str, status: int = 0) -> None:
        monkeypatch.setattr(environments, "newest", lambda package: newest)
        monkeypatch.setattr(environments, "environment", lambda *_: Path("python"))
        done = SimpleNamespace(returncode=status)
        monkeypatch.setattr(environments.subprocess, "run", lambda *args, **kwargs: done)

    return offer


def test_the_pinned_one_is_not_tested_twice(index: Any, capsys: pytest.CaptureFixture) -> None:
    index(HERE, 1)
    assert environments.main(["newest"]) == 0
    assert "`make test` has it" in capsys.readouterr().out


def test_an_index_that_lags_behind(index: Any, capsys: pytest.CaptureFixture) -> None:
    index("5.0.0", 1)
    assert environments.main(["newest"]) == 0
    assert "no transformers newer than 5.0.0" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1, 2, 4])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_fails_is_said_and_what_is_recorded_is_not_silent(
    index: Any,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    recorded: bool,
) -> None:
    index("99.0.0", status)
    if recorded:
        known = {("transformers", "99.0.0"): ("2026-11-29", "a bug of theirs")}
        monkeypatch.setattr(environments, "KNOWN_FAILURES", known)
    found, said = environments.main(["newest"]), capsys.readouterr().out
    assert found == (0 if recorded and status == 1 else status)
    assert ("FAILS as recorded on 2026-11-29: a bug of theirs" in said) == (
        recorded and status == 1
    )
    assert ("known_failures.py, which says how" in said) == bool(found)
    assert ("can go" in said) == (recorded and not status)


def test_an_index_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = subprocess.CompletedProcess([], 1, stdout="")
    monkeypatch.setattr(environments.subprocess, "run", lambda *args, **kwargs: silent)
    with pytest.raises(SystemExit, match="did not say which versions of transformers"):
        environments.newest("transformers")


@pytest.mark.parametrize("arguments", [[], ["newset"]])
def test_a_word_that_is_none(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"oldest \| newest \| torch"):
        environments.main(arguments)


def test_the_newest_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1+cpu, 2.14.1, 2.13.0+cpu\n"
    done = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(environments.subprocess, "run", lambda *args, **kwargs: done)
    assert environments.newest("torch") == "2.14.1+cpu"
    assert environments.newest("transformers") == "2.15.0"
