"""A worker's metrics: the engine's counters as they stand when Prometheus asks, and how long its steps take.

The names are those of vLLM's metrics with `pagemill:` for `vllm:`, where both measure the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
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
    """The registry of a worker. `stats` gives the fields of `EngineStats` of each model that was loaded once.

    `load_seconds` are those of each model's last load; `loaded` are the models that are in memory.
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        stats: Callable[[], Mapping[str, Mapping[str, Any]]],
        load_seconds: Callable[[], Mapping[str, float]],
        loaded: Callable[[], Collection[str]],
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
        )
        self._switches = Counter(
            "pagemill:model_switches", "Turns to this model from another.", LABELS, registry=self.registry
        )
        for model in models:
            self._step_seconds.labels(model)
            self._switches.labels(model)
        self.registry.register(_EngineCollector(models, stats, load_seconds, loaded, unwritten, is_ready))

    def observe_step(self, model: str, seconds: float) -> None:
        """Count a step of a model's engine."""
        self._step_seconds.labels(model).observe(seconds)

    def count_switch(self, model: str) -> None:
        """Count a turn to a model."""
        self._switches.labels(model).inc()


class _EngineCollector(Collector):
    def __init__(
        self,
        models: Sequence[str],
        stats: Callable[[], Mapping[str, Mapping[str, Any]]],
        load_seconds: Callable[[], Mapping[str, float]],
        loaded: Callable[[], Collection[str]],
        unwritten: Callable[[], int],
        is_ready: Callable[[], bool],
    ) -> None:
        self._models = models
        self._stats = stats
        self._load_seconds = load_seconds
        self._loaded = loaded
        self._unwritten = unwritten
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        ready, loaded = float(self._is_ready()), self._loaded()
        yield _gauge("pagemill:worker_ready", "1 while this worker holds a lease.", dict.fromkeys(self._models, ready))
        # A worker's results of all its models wait together: one series.
        unwritten = {self._models[0]: float(self._unwritten())}
        yield _gauge("pagemill:unwritten_results", "Results that are not in Postgres yet.", unwritten)
        is_loaded = {model: float(model in loaded) for model in self._models}
        yield _gauge("pagemill:model_loaded", "1 while the model is in memory.", is_loaded)
        yield _gauge("pagemill:model_load_seconds", "Seconds that the model's last load took.", self._load_seconds())
        stats = self._stats()
        if not stats:
            return

        def of(field: str) -> dict[str, float]:
            return {model: found[field] for model, found in stats.items()}

        for field, (name, meaning) in GAUGES.items():
            yield _gauge(name, meaning, of(field))
        usage = {model: found["kv_blocks_used"] / max(1, found["kv_blocks"]) for model, found in stats.items()}
        yield _gauge("pagemill:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage)
        for field, (name, meaning) in COUNTERS.items():
            yield _counter(name, meaning, of(field))
        # As vLLM has it: what the prefix cache was asked for and what it had are both counted in tokens.
        queries = "Prompt tokens that were looked up in the prefix cache."
        yield _counter("pagemill:prefix_cache_queries", queries, of("prompt_tokens"))
        ended = CounterMetricFamily(
            "pagemill:request_success", "Requests that ended, by how.", labels=(*LABELS, "finished_reason")
        )
        for model, found in stats.items():
            for reason, count in found["finished"].items():
                ended.add_metric((model, str(reason)), count)
        yield ended


def _gauge(name: str, meaning: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=LABELS)
    for model, value in values.items():
        family.add_metric((model,), value)
    return family


def _counter(name: str, meaning: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=LABELS)
    for model, value in values.items():
        family.add_metric((model,), value)
    return family
