"""One engine on a CPU, with the connector and without."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from nexusquant.hf.store_profiles import load_store_profile, save_store_profile
from tests.vllm.engine import BLOCK, PROMPT, run

COLD = {"do": "generate", "name": "cold"}
RESET = {"do": "reset"}
AGAIN = {"do": "generate", "name": "again"}
METRICS = {"do": "metrics"}


@pytest.fixture(scope="module")
def plain(model: Path) -> Any:
    """Without a connector: a prompt, and the same prompt again from vLLM's own prefix cache."""
    return run(model, [COLD, AGAIN])


@pytest.fixture(scope="module")
def raw(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With bits as they are: a prompt, the same from the store, and after a byte was flipped."""
    steps = [COLD, RESET, AGAIN, METRICS, {"do": "flip"}, RESET]
    steps += [{"do": "generate", "name": "flipped"}, METRICS | {"name": "after"}]
    return run(model, steps, store=str(tmp_path_factory.mktemp("store")), codec="raw")


def of(result: Any, name: str) -> Any:
    """The one output of a step."""
    return result[name]["outputs"][0]


def test_raw_is_bit_identical_to_no_connector(plain: Any, raw: Any) -> None:
    assert of(raw, "cold")["cached"] == 0
    assert of(raw, "cold") == of(plain, "cold")
    # The same tokens are left to compute as behind vLLM's own prefix cache.
    assert of(raw, "again") == of(plain, "again")


def test_hits_are_counted_by_vllm(raw: Any) -> None:
    again, metrics = of(raw, "again"), raw["metrics"]
    whole = (again["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert again["cached"] == whole > 500
    assert metrics["vllm:external_prefix_cache_hits"] >= whole
    assert metrics["vllm:nexusquant_saved_blocks"] >= whole // BLOCK
    assert metrics["vllm:nexusquant_loaded_blocks"] >= whole // BLOCK


def test_a_flipped_byte_is_computed_again(raw: Any, plain: Any) -> None:
    assert raw["metrics"]["vllm:nexusquant_damaged_blocks"] == 1
    flipped, cold = of(raw, "flipped"), of(plain, "cold")
    assert flipped["tokens"] == cold["tokens"]
    # Computed in other pieces, so other roundings, but nothing of the damaged block.
    assert divergence(cold, flipped) < 1e-6


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-3), (6, 1e-2)])
def test_compressed_drift_and_bytes(
    bits: int, limit: float, model: Path, plain: Any, tmp_path: Path
) -> None:
    kl, ratio = compressed(model, plain, tmp_path, "e8", {"bits": bits})
    assert kl < limit
    assert ratio > 0.9 * 32 / (bits + 1)


@pytest.mark.parametrize(("bits", "limit"), [(5, 3e-4), (4, 2e-3)])
def test_drift_and_bytes_with_a_profile(
    bits: float, limit: float, model: Path, profile: Path, plain: Any, tmp_path: Path
) -> None:
    options = {"profile": str(profile), "bits": bits}
    kl, ratio = compressed(model, plain, tmp_path, "entropy", options)
    assert kl < limit
    assert ratio > 0.9 * 32 / (bits + 1)


def test_profiles_are_found_by_the_weights(
    model: Path, profile: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load_store_profile(profile)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_store_profile(known)
    kl, _ = compressed(model, plain, tmp_path / "store", "entropy", {})
    assert kl < 3e-4


def compressed(
    model: Path, plain: Any, store: Path, codec: str, options: dict[str, Any]
) -> tuple[float, float]:
    """KL of what is generated behind loaded blocks, and how much smaller than fp32 they are."""
    steps = [COLD, RESET, AGAIN, METRICS]
    result = run(model, steps, store=str(store), codec=codec, codec_options=options)
    metrics, kl = result["metrics"], divergence(of(plain, "again"), of(result, "again"))
    ratio = metrics["vllm:nexusquant_saved_raw_bytes"] / metrics["vllm:nexusquant_saved_bytes"]
    sys.stdout.write(
        f"\n{codec} {options.get('bits', '')}: KL {kl:.2e} nats, {ratio:.2f} times below fp32\n"
    )
    assert of(result, "cold") == of(plain, "cold"), "saving changes nothing"
    assert of(result, "again")["cached"] == of(plain, "again")["cached"]
    return kl, ratio


def test_a_stopped_redis_is_a_miss(model: Path, plain: Any, redis: tuple[str, Any]) -> None:
    url, server = redis
    steps = [COLD, RESET, AGAIN, {"do": "kill", "process": server.pid}, RESET]
    steps += [{"do": "generate", "name": "stopped"}, RESET, {"do": "generate", "name": "still"}]
    result = run(model, [*steps, METRICS], store=url, codec="raw")
    assert of(result, "again")["cached"] > 0
    for name in ("stopped", "still"):
        assert of(result, name)["cached"] == 0
        assert of(result, name)["tokens"] == of(plain, "cold")["tokens"]
        assert divergence(of(plain, "cold"), of(result, name)) < 1e-6
    assert result["log"].count("does not answer") == 2, "once in the scheduler, once in the worker"
    assert result["still"]["seconds"] < 2 * result["cold"]["seconds"] + 2, "no timeout per request"


def test_many_requests_in_chunks_with_too_few_blocks(model: Path, tmp_path: Path) -> None:
    """Prefill in chunks, prefixes in common, requests preempted and resumed: the same tokens."""
    prompts = [PROMPT[: 1500 - 100 * number] + f" {number}" for number in range(6)]
    tight = {
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 40,
        "max_num_seqs": 6,
        "max_model_len": 1024,
    }
    ask = {"do": "generate", "prompts": prompts, "tokens": 48}
    steps = [ask | {"name": "cold"}, RESET, ask | {"name": "again"}, METRICS]
    expected = run(model, steps, engine=tight)
    result = run(model, steps, store=str(tmp_path), codec="raw", engine=tight)
    for name in ("cold", "again"):
        for given, found in zip(expected[name]["outputs"], result[name]["outputs"], strict=True):
            assert given["tokens"] == found["tokens"]
            assert divergence(given, found) < 1e-6
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert sum(output["cached"] for output in result["again"]["outputs"]) > 1000


def divergence(expected: Any, given: Any) -> float:
    """Mean KL over positions while tokens agree, in nats, of the 20 likeliest tokens."""
    total, count = 0.0, 0
    pairs = zip(
        expected["tokens"], given["tokens"], expected["logprobs"], given["logprobs"], strict=True
    )
    for token, other, p, q in pairs:
        common = p.keys() & q.keys()
        mass_p, mass_q = (math.fsum(math.exp(x[t]) for t in common) for x in (p, q))
        total += math.fsum(
            math.exp(p[t]) / mass_p * (p[t] - q[t] - math.log(mass_p / mass_q)) for t in common
        )
        count += 1
        if token != other:
            break
    return total / count
