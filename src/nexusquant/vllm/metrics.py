"""What the connector counts, as vLLM logs it and as Prometheus sees it."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from nexusquant.vllm.counters import COUNTERS, Counters


class NexusQuantStats(KVConnectorStats):
    """Sums of COUNTERS over an interval, and over scheduler and workers."""

    def reset(self) -> None:
        """Begin anew."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another process, or a later interval, counted."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log: the sums, and the ratio of what was saved."""
        sums = {name: round(count, 3) for name, count in self.data.items()}
        if sums.get("saved_bytes"):
            sums["saved_ratio"] = round(self.data["saved_raw_bytes"] / self.data["saved_bytes"], 2)
        return sums

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


def take(counters: Counters) -> NexusQuantStats | None:
    """What was counted since the last call; None for nothing."""
    return NexusQuantStats(data=sums) if (sums := counters.take()) else None


class NexusQuantPromMetrics(KVConnectorPromMetrics):
    """A Prometheus counter `vllm:nexusquant_NAME` for each of COUNTERS, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        families = {
            name: self._counter_cls(
                name=f"vllm:nexusquant_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in COUNTERS.items()
        }
        self._counters = {
            engine: {name: family.labels(*values) for name, family in families.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's sums."""
        for name, count in transfer_stats_data.items():
            self._counters[engine_idx][name].inc(count)
