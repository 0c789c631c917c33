"""A tiny model with its storage profile, and a file that was packed with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nexusquant
from nexusquant import load_store_profile, loading
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import default_store_path
from tests.test_cli import STORY, run


@pytest.fixture(scope="module")
def profile(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's storage profile, built once."""
    path = tmp_path_factory.mktemp("profile") / "p"
    code, out, err = run("calibrate", folder, "--store", "--tokens", 500, "--pieces", 2, "-o", path)
    assert code == 0, err
    assert out.splitlines()[1] == str(path)
    assert re.match(r"2 layers from 1,000 tokens of Python language reference: 0\.\d MiB", out)
    return path


@pytest.fixture
def known(folder: Path, profile: Path) -> Path:
    """It is where commands look for it."""
    model, _ = loading.load_model(folder)
    nexusquant.save_store_profile(load_store_profile(profile))
    return default_store_path(fingerprint(model))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


@pytest.fixture
def packed(folder: Path, known: Path, story: Path, tmp_path: Path) -> Path:
    path = tmp_path / "story.nxq"
    code, out, err = run("pack", folder, "--prompt-file", story, "-o", path)
    assert code == 0, err
    assert re.fullmatch(rf"\d+ tokens in 0\.\d\d MiB, \d\.\dx smaller than fp16: {path}\n", out)
    return path
