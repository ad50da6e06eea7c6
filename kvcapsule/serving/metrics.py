"""Prometheus metrics of capsules, through vLLM's own hooks for KV connectors: they are among vLLM's at /metrics."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from .stats import COUNTS, LEVELS, merge

PREFIX = "vllm:kvcapsule_"
"""vLLM takes metrics back by their first five letters when it starts anew in a process."""


class CapsuleStats(KVConnectorStats):
    """What the scheduler and the workers counted, on its way to the process that answers /metrics."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return CapsuleStats(data=merge(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        both = {**self.data.get("counts", {}), **self.data.get("levels", {})}
        return {name: round(value, 3) for name, value in both.items()}

    def is_empty(self) -> bool:
        return not self.data


class CapsuleMetrics(KVConnectorPromMetrics):
    """The metrics, one for each engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def build(kind: Any, of: dict[str, str]) -> dict[str, Any]:
            metrics = {
                name: kind(name=PREFIX + name, documentation=text, labelnames=labelnames) for name, text in of.items()
            }
            return {name: create_metric_per_engine(metric, per_engine_labelvalues) for name, metric in metrics.items()}

        self.counts, self.levels = build(metric_types[Counter], COUNTS), build(metric_types[Gauge], LEVELS)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.get("counts", {}).items():
            self.counts[name][engine_idx].inc(amount)
        for name, value in transfer_stats_data.get("levels", {}).items():
            self.levels[name][engine_idx].set(value)
