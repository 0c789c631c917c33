"""The comparison in benchmarks/: its protocol, its quantizer, and bytes counted by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import nexusquant
from benchmarks import compare, lloyd_max
from benchmarks.calibrated import Profiles
from benchmarks.competitors import (
    EvictionOnly,
    LloydMax,
    NotRunnable,
    Prompt,
    TransformersQuantized,
    counted_bytes,
)
from benchmarks.field import FIELDS, competitors
from benchmarks.measure import FACT, Reference, prepare
from benchmarks.original import Original, Package, count_codes, entropy
from nexusquant import CompressionConfig, NexusCache
from tests.bench_cases import DIM, HEADS, LAYERS, TEXT, TOKENS, profiles_of
from tests.tiny_checkpoint import save_folder, tiny_tokenizer

# Old packages warn while they are imported.
third_party = pytest.mark.filterwarnings("ignore")


# -- the scalar quantizer


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.7979]),
        (2, [0.4528, 1.5104]),
        (3, [0.2451, 0.7560, 1.3439, 2.1520]),  # Max 1960, table I
    ],
)
def test_levels_are_those_of_max(bits: int, positive: list[float]) -> None:
    levels = lloyd_max.lloyd_max_levels(bits)
    expected = torch.tensor([-x for x in reversed(positive)] + positive, dtype=torch.float64)
    torch.testing.assert_close(levels, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_round_trip_has_the_known_distortion(bits: int, distortion: float) -> None:
    x = torch.randn(2000, 64) * torch.rand(2000, 1) * 10
    error = (lloyd_max.round_trip(x, bits) - x).square().sum(-1) / x.square().sum(-1)
    assert error.mean().item() == pytest.approx(distortion, rel=0.05)


def test_round_trip_of_zero_is_zero() -> None:
    assert not lloyd_max.round_trip(torch.zeros(3, 16), 2).any()


def test_lloyd_max_bits_by_hand(prompt: Prompt) -> None:
    assert lloyd_max.bits_per_element(2, dim=64, tokens=100) == 2.25
    assert LloydMax(3, sinks=4).prefill(prompt).bits == (124 * (3 + 16 / DIM) + 4 * 16) / 128


# -- bytes


def test_wide_floats_count_as_fp16_and_shared_storage_once() -> None:
    base = torch.zeros(10)
    assert counted_bytes([base, base[:5]]) == 20
    assert counted_bytes({"codes": torch.zeros(7, dtype=torch.uint8)}) == 7
    assert counted_bytes([torch.zeros(10, dtype=torch.float16), torch.zeros(3).long()]) == 20 + 24


@third_party
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_quantized_cache_bits_by_hand(prompt: Prompt, backend: str, bits: int) -> None:
    axis = 0 if backend == "quanto" else 1
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    found = TransformersQuantized(backend, bits, axis, axis).prefill(prompt)
    assert found.bits == bits + 2 * 16 / 64  # a scale and a zero for every 64


@pytest.mark.parametrize("quality", ["lossless", "max"])
def test_one_recorded_prefill_serves_every_config(
    prompt: Prompt, model: LlamaForCausalLM, quality: str
) -> None:
    profile = profiles_of(model).get()
    ids = torch.randint(2, 320, (1, 9), generator=torch.Generator().manual_seed(1))
    run = NexusCache(model, quality, profile=profile)
    model(prompt.ids, cache=run)
    replayed = prompt.compressed(run.config, profile)
    assert replayed.nbytes == run.nbytes
    assert replayed.compression_ratio > 3
    outputs = (model(ids, cache=cache).logits for cache in (run, replayed))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_eviction_only_pays_fp16_for_kept_tokens(prompt: Prompt) -> None:
    config = CompressionConfig(codec="exact", scorer="key_norm", evict_ratio=0.5)
    found = EvictionOnly("eviction only", "half", config).prefill(prompt)
    kept = found.cache.stats().kept_tokens
    assert kept < 0.6 * TOKENS
    overhead = found.bits - 16 * kept / TOKENS
    assert 0 < overhead < 1  # positions of the kept tokens


def test_entropy_by_hand() -> None:
    assert entropy(torch.zeros(4, 8, dtype=torch.long)) == 0
    kinds = torch.tensor([[0] * 8, [1] * 8])  # the coset bit of two groups in 16 entries
    assert entropy(kinds) == pytest.approx(2 / 16)
    assert entropy(torch.tensor([[0, 2, 0, 2, 0, 2, 0, 2]])) == pytest.approx(1)
    assert entropy(torch.zeros(0, 8, dtype=torch.long)) == 0


# -- the protocol


@third_party
def test_every_competitor_gives_a_cache_to_continue_from(
    model: LlamaForCausalLM, prompt: Prompt, profiles: Profiles
) -> None:
    kept = [keys.clone() for keys, _ in prompt.exact]
    ran = set()
    for one in competitors(profiles, None):
        try:
            found = one.prefill(prompt)
        except NotRunnable:
            continue
        ran.add(one.family)
        assert found.how == ("measured" if one.family.startswith("ours") else "counted")
        assert 0 < found.bits < 16, one
        assert found.cache.get_seq_length() == TOKENS
        with torch.no_grad():
            logits = model(prompt.ids[:, :40], cache=found.cache, use_cache=True).logits
        assert torch.isfinite(logits).all(), one
    assert {"ours, presets", "ours, Hadamard", "eviction only", "scalar Lloyd-Max"} <= ran
    assert all(
        torch.equal(keys, before) for (keys, _), before in zip(prompt.exact, kept, strict=True)
    )


@pytest.mark.parametrize("name", FIELDS)
def test_labels_are_unique_and_calibration_waits(name: str, profiles: Profiles) -> None:
    idle = Profiles(None, None, [], lambda line: None)  # cannot calibrate
    labels = [(one.family, one.name) for one in FIELDS[name](idle, None)]
    assert len(set(labels)) == len(labels)
    assert idle.nbytes == 0


def test_more_bits_diverge_less(model: LlamaForCausalLM) -> None:
    text = prepare(tiny_tokenizer(), "lines", TEXT, 256, 32)
    assert text is not None
    reference = Reference.of(model, text)
    low, high = (reference.run(LloydMax(bits))[0] for bits in (2, 4))
    assert 0 < high.kl < low.kl


def test_prepared_text_hides_the_fact_in_a_prompt_of_the_given_length() -> None:
    tokenizer = tiny_tokenizer()
    text = prepare(tokenizer, "lines", TEXT, 256, 32)
    assert text is not None
    assert text.prompt.shape == (1, 256)
    assert FACT in tokenizer.decode(text.prompt[0])
    assert prepare(tokenizer, "short", "not much", 256, 32) is None


# -- nexusquant-kv, by a stand-in with its interface

STAND_IN = """
import torch

class E8Lattice:
    @staticmethod
    def quantize_perhead(x, levels=8):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (levels / 2)
        return (x / scale).round() * scale

class NexusQuantEvict:
    def __init__(self, eviction_rate, key_bits, value_bits):
        self.rate = eviction_rate

    def set_model_config(self, config):
        pass

    def compress(self, cache):
        import nexusquant.pipeline  # as its functions do
        for layer in cache.layers:
            keep = torch.arange(layer.keys.shape[2]) >= round(self.rate * layer.keys.shape[2])
            for name in ("keys", "values"):
                x = getattr(layer, name) * keep[:, None]
                setattr(layer, name, E8Lattice.quantize_perhead(x, 4))
        return cache, keep[None].float()
"""


def test_original_runs_beside_ours(tmp_path: Path, prompt: Prompt) -> None:
    (tmp_path / "nexusquant").mkdir()
    (tmp_path / "nexusquant" / "__init__.py").write_text("")
    (tmp_path / "nexusquant" / "pipeline.py").write_text(STAND_IN)
    found = Original(Package(tmp_path), "balanced").prefill(prompt)
    assert sys.modules["nexusquant"] is nexusquant
    assert "nexusquant.pipeline" not in sys.modules
    assert str(tmp_path) not in sys.path
    assert found.keep is not None
    assert found.keep.sum().item() == TOKENS - round(0.6 * TOKENS) == 51
    vectors = 51 * HEADS * 2 * LAYERS
    assert found.bits * prompt.elements > vectors * 16 + 24 * 8 + TOKENS  # and the codes
    assert found.bits < 4 * 51 / TOKENS
    assert Original(Package(tmp_path), "balanced", masked=False).prefill(prompt).keep is None


def test_counted_codes_by_hand() -> None:
    class Lattice:
        @staticmethod
        def quantize_perhead(x: torch.Tensor, levels: int = 8) -> torch.Tensor:
            return x

    live = torch.tensor([2.0, -2.0, 2.0, -2.0] * 4)
    with count_codes(Lattice) as count:
        Lattice.quantize_perhead(torch.stack([live, torch.zeros(16)]), levels=4)
    assert count.bits == pytest.approx(16 * 1 + 16)  # two codes, alike in number; one scale
    assert Lattice.quantize_perhead(live) is live


def test_original_that_lacks_a_package_is_not_runnable(tmp_path: Path, prompt: Prompt) -> None:
    (tmp_path / "nexusquant").mkdir()
    (tmp_path / "nexusquant" / "__init__.py").write_text("import no_such_package")
    with pytest.raises(NotRunnable, match="no_such_package"):
        Original(Package(tmp_path), "max").prefill(prompt)
    assert sys.modules["nexusquant"] is nexusquant
    with pytest.raises(NotRunnable, match="no such file"):
        Original(Package(tmp_path / "absent.whl"), "max").prefill(prompt)


def test_original_without_its_wheel_says_what_to_do(prompt: Prompt) -> None:
    with pytest.raises(NotRunnable, match="pip download"):
        Original(None, "max").prefill(prompt)


# -- the command


def test_command_writes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text(TEXT)
    compare.main(
        str(save_folder(tmp_path / "model")), text=[tmp_path / "lines.txt"], calibration=None,
        original=None, field="competitors", only=["Lloyd-Max", "nexusquant-kv, evicting"],
        prefix=128, continuation=16,
        dtype="float32", device="cpu", json_file=tmp_path / "out.json", plot=None,
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["summary"]] == ["2 bits", "3 bits", "4 bits"]
    assert all(row["ratio"] == pytest.approx(16 / row["bits"]) for row in result["rows"])
    assert list(result["not_runnable"]) == ["nexusquant-kv, evicting"]
    assert "not runnable: nexusquant-kv, evicting: needs --original" in capsys.readouterr().out


def test_summary_leaves_unknown_needles_out() -> None:
    row = {
        "family": "f", "name": "n", "how": "counted", "bits": 2.0, "ratio": 8.0, "kl": 0.1,
        "loss_change": 0.0, "top1": 1.0,
    }  # fmt: skip
    rows = [row | {"needle": 0.5}, row | {"needle": math.nan, "bits": 4.0}]
    (only,) = compare.summarize(rows)
    assert only["needle"] == 0.5
    assert only["ratio"] == 16 / 3


@third_party
def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    points = [
        {"family": "ours, presets", "name": name, "ratio": ratio, "kl": kl}
        for name, ratio, kl in (("high", 9.0, 0.01), ("max", 30.0, 0.1))
    ]
    draw(points, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@third_party
def test_times_are_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw_times

    rows = [{"what": "codes", "tokens": n, "ms": n / 100} for n in (1024, 8192)]
    draw_times(rows, "what", "ms", "ms", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
