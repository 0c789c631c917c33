"""`nexusquant models` and `nexusquant doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BloomConfig,
    BltConfig,
    FalconConfig,
    FalconH1Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    T5Config,
)

from nexusquant.cli.coverage import parse_bytes
from nexusquant.errors import ConfigError, LoadError
from nexusquant.hf.coverage import cover
from nexusquant.hf.expected import expected_bytes, longest_context
from nexusquant.loading import load_config
from tests.test_cli import run


def test_models_prints_every_type(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    status, out, _ = run("models", "--only", "llama", "--json", file)
    assert status == 0
    for words in ("llama4", "diffllama", "compressed", "transformers"):
        assert words in out
    types = json.loads(file.read_text())["types"]
    assert types["llama"]["status"] == "compressed"
    assert types["llama"]["layers"][0]["elements"] == 2 * 4096
    assert "splits and repeats" in types["diffllama"]["reasons"]


def test_models_of_no_such_name() -> None:
    status, _, error = run("models", "--only", "nothing like it")
    assert status == 2
    assert "no causal LM type" in error


def test_doctor_needs_a_config_only(tmp_path: Path) -> None:
    LlamaConfig(num_key_value_heads=8).save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        status, out, _ = run("doctor", where, "--memory", "1GiB")
        assert status == 0
        assert "32 x full, 8 KV heads of 128: attention on codes" in out
        assert "131,072" in out  # bytes per token, uncompressed
        assert "tokens in 1GiB" in out
        assert "8,192" in out  # of them
        assert "made for up to 2,048 positions" in out


def test_doctor_says_what_is_not_compressed(tmp_path: Path) -> None:
    said = {
        BloomConfig: "decoded for each pass: the model multiplies queries",
        MistralConfig: "sliding, 8 KV heads of 128, window of 4,096",
        MambaConfig: "has no attention layers. Nothing can be compressed.",
        FalconH1Config: "state and full",
    }
    for config, words in said.items():
        config().save_pretrained(tmp_path)
        status, out, _ = run("doctor", tmp_path)
        assert status == 0
        assert words in " ".join(out.split())


def test_doctor_json(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    file = tmp_path / "doctor.json"
    assert run("doctor", tmp_path, "--json", file)[0] == 0
    found = json.loads(file.read_text())["coverage"]
    assert found["status"] == "compressed"
    assert len(found["layers"]) == 32


@pytest.mark.parametrize("what", ["./no/such/folder", "no.gguf"])
def test_doctor_of_nothing(what: str) -> None:
    status, _, error = run("doctor", what)
    assert status == 2
    assert "no such file" in error


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot read a config"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(LoadError, match="cannot read a config"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 2**33), ("500 MB", 500_000_000), ("1.5kib", 1536), ("2tb", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8", "GiB", "-1GiB", "nanGB", "infGB", "1e30TB", "8 GiBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size such as 8GiB"):
        parse_bytes(text)


def test_encoder_decoders_are_refused() -> None:
    for config in (T5Config(), BartConfig(architectures=["BartForConditionalGeneration"])):
        coverage = cover(config)
        assert coverage.status == "refused"
        assert "encoder-decoder" in coverage.reasons
    assert cover(BartConfig(architectures=["BartForCausalLM"])).status == "compressed"


def test_falcon_repeats_its_heads_before_they_are_cached() -> None:
    config = FalconConfig(
        hidden_size=512, num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True
    )
    assert {layer.kv_heads for layer in cover(config).layers} == {8}
    assert {layer.kv_heads for layer in cover(FalconConfig()).layers} == {1}


def test_a_config_without_layers(tmp_path: Path) -> None:
    BltConfig().save_pretrained(tmp_path)
    status, out, _ = run("doctor", tmp_path)
    assert status == 0
    assert "cannot be told from its config" in " ".join(out.split())


def test_heads_that_cannot_be_coded() -> None:
    coverage = cover(LlamaConfig(hidden_size=48, num_attention_heads=4))
    assert coverage.status == "exact"
    assert "head_dim 12 is no multiple of 8" in coverage.reasons


def test_a_model_that_transformers_does_not_know_goes_by_the_rules() -> None:
    class OwnConfig(PreTrainedConfig):
        model_type = "own"

    config = OwnConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    coverage = cover(config)
    assert coverage.status == "compressed"
    assert [layer.elements for layer in coverage.layers] == [128, 128]


def test_the_longest_context_just_fits() -> None:
    layers = cover(LlamaConfig(num_key_value_heads=8)).layers
    budget = 10**9
    tokens = longest_context(None, layers, budget)
    assert tokens is not None
    assert expected_bytes(None, layers, tokens) <= budget < expected_bytes(None, layers, tokens + 1)
    windows = cover(MistralConfig()).layers
    assert longest_context(None, windows, 2**33) is None  # a window never grows beyond itself
    assert longest_context(None, layers, 1) == 0
