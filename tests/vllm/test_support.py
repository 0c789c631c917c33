"""What is refused at the start, and what is counted, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

import nexusquant.vllm
from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.vllm.counters import COUNTERS, Counters
from nexusquant.vllm.metrics import NexusQuantStats, take
from nexusquant.vllm.support import check

PLAIN: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.bfloat16,
}


def vllm_config(**changes: Any) -> Any:
    parts = {
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "cache_config": {"cache_dtype": "auto"},
        "model_config": {"dtype": torch.bfloat16},
        "kv_transfer_config": {"is_kv_consumer": True, "kv_load_failure_policy": "recompute"},
    }
    made = {name: SimpleNamespace(**(part | changes)) for name, part in parts.items()}
    return SimpleNamespace(**made, speculative_config=changes.get("speculative"))


def caches(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


FULL = FullAttentionSpec(**PLAIN)


def test_plain_models_are_taken() -> None:
    check(vllm_config(), caches(FULL))
    check(vllm_config(cache_dtype="bfloat16"), caches(FULL))
    check(vllm_config(speculative=SimpleNamespace(method="ngram")), caches(FULL))
    check(vllm_config(is_kv_consumer=False, kv_load_failure_policy="fail"), caches(FULL))


@pytest.mark.parametrize(
    ("changes", "specs", "match"),
    [
        ({}, [FULL, FULL], "2 groups"),
        ({}, [MLAAttentionSpec(**PLAIN | {"num_kv_heads": 1})], "MLAAttentionSpec"),
        ({}, [SlidingWindowSpec(**PLAIN, sliding_window=128)], "SlidingWindowSpec"),
        ({"cache_dtype": "fp8"}, [FULL], "--kv-cache-dtype fp8"),
        ({"decode_context_parallel_size": 2}, [FULL], "context parallelism"),
        ({"prefill_context_parallel_size": 2}, [FULL], "context parallelism"),
        ({"speculative": SimpleNamespace(method="eagle")}, [FULL], "eagle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_refused(changes: dict[str, Any], specs: list[Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        check(vllm_config(**changes), caches(*specs))


def test_loads_that_end_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="recompute"):
        check(vllm_config(kv_load_failure_policy="fail"), caches(FULL))


def test_counts_of_processes_add_up() -> None:
    counters = Counters()
    assert take(counters) is None
    counters.add(saved_bytes=100, saved_raw_bytes=400)
    stats = take(counters)
    assert stats is not None
    stats.aggregate(
        NexusQuantStats(data={"saved_bytes": 100, "saved_raw_bytes": 100, "lookups": 1})
    )
    assert stats.reduce() == {
        "saved_bytes": 200,
        "saved_raw_bytes": 500,
        "lookups": 1,
        "saved_ratio": 2.5,
    }
    assert stats.data.keys() <= COUNTERS.keys()
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def test_the_connector_is_found_by_its_name() -> None:
    found = nexusquant.vllm.NexusQuantConnector
    assert found.__module__ == "nexusquant.vllm.connector"
    assert isinstance(found.build_kv_connector_stats(), NexusQuantStats)
