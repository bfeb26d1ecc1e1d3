"""A worker's metrics: the engine's counters as they stand when Prometheus asks, and how long its steps take.

The names are those of vLLM's metrics with `pagemill:` for `vllm:`, where both measure the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.metrics_server import new_registry

LABELS = ("model_name",)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

GAUGES = {
    "running": ("pagemill:num_requests_running", "Completions in the engine's batch."),
    "waiting": ("pagemill:num_requests_waiting", "Completions queued in the engine, preempted ones included."),
    "compiling": ("pagemill:num_requests_compiling", "Completions that wait for their grammar to be compiled."),
    "kv_blocks": ("pagemill:kv_cache_blocks", "Blocks of the KV cache."),
}
COUNTERS = {
    "prompt_tokens": ("pagemill:prompt_tokens", "Prompt tokens of started completions, cached ones included."),
    "output_tokens": ("pagemill:generation_tokens", "Tokens generated."),
    "computed_tokens": ("pagemill:computed_tokens", "Tokens run through the model, recomputed ones included."),
    "cached_prompt_tokens": ("pagemill:prefix_cache_hits", "Prompt tokens that the prefix cache held."),
    "preemptions": ("pagemill:num_preemptions", "Completions that gave their memory to others and start again."),
    "steps": ("pagemill:engine_steps", "Steps of the engine."),
    "rejected": ("pagemill:request_rejected", "Requests that the engine refused."),
}


class WorkerMetrics:
    """The registry of a worker. `stats` gives the fields of `EngineStats`, and nothing before the model is loaded."""

    def __init__(
        self,
        model: str,
        *,
        stats: Callable[[], Mapping[str, Any]],
        unwritten: Callable[[], int],
        is_ready: Callable[[], bool],
    ) -> None:
        self.registry: CollectorRegistry = new_registry()
        self._step_seconds = Histogram(
            "pagemill:engine_step_seconds",
            "Seconds of one call of the engine's step.",
            LABELS,
            registry=self.registry,
            buckets=STEP_BUCKETS,
        ).labels(model)
        self.registry.register(_EngineCollector(model, stats, unwritten, is_ready))

    def observe_step(self, seconds: float) -> None:
        """Count a step of the engine."""
        self._step_seconds.observe(seconds)


class _EngineCollector(Collector):
    def __init__(
        self,
        model: str,
        stats: Callable[[], Mapping[str, Any]],
        unwritten: Callable[[], int],
        is_ready: Callable[[], bool],
    ) -> None:
        self._model = model
        self._stats = stats
        self._unwritten = unwritten
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("pagemill:worker_ready", "1 while this worker holds a lease.", float(self._is_ready()))
        yield self._gauge("pagemill:unwritten_results", "Results that are not in Postgres yet.", self._unwritten())
        stats = self._stats()
        if not stats:
            return
        for field, (name, meaning) in GAUGES.items():
            yield self._gauge(name, meaning, stats[field])
        usage = stats["kv_blocks_used"] / stats["kv_blocks"]
        yield self._gauge("pagemill:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage)
        for field, (name, meaning) in COUNTERS.items():
            yield self._counter(name, meaning, stats[field])
        # As vLLM has it: what the prefix cache was asked for and what it had are both counted in tokens.
        queries = "Prompt tokens that were looked up in the prefix cache."
        yield self._counter("pagemill:prefix_cache_queries", queries, stats["prompt_tokens"])
        finished = CounterMetricFamily(
            "pagemill:request_success", "Requests that ended, by how.", labels=(*LABELS, "finished_reason")
        )
        for reason, count in stats["finished"].items():
            finished.add_metric((self._model, str(reason)), count)
        yield finished

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=LABELS)
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=LABELS)
        family.add_metric((self._model,), value)
        return family
