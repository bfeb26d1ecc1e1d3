"""What Prometheus and health checks read of a worker and a courier, over real HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from worker.courier.metrics import CourierMetrics
from worker.generation.metrics import WorkerMetrics
from worker.metrics_server import MetricsServer

STATS = {
    "running": 3,
    "waiting": 5,
    "compiling": 1,
    "kv_blocks": 40,
    "kv_blocks_used": 10,
    "steps": 7,
    "preemptions": 2,
    "prompt_tokens": 100,
    "cached_prompt_tokens": 60,
    "output_tokens": 50,
    "computed_tokens": 90,
    "finished": {"stop": 4, "length": 6},
    "rejected": 8,
}


@contextmanager
def serving(metrics: WorkerMetrics | CourierMetrics, *, is_ready: bool = True) -> Iterator[httpx.Client]:
    server = MetricsServer(metrics.registry, lambda: is_ready)
    port = server.start("127.0.0.1", 0)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    finally:
        server.close()


def worker_metrics(stats: dict[str, object]) -> WorkerMetrics:
    return WorkerMetrics(
        ["org/name"],
        stats=lambda: {"org/name": stats} if stats else {},
        load_seconds=lambda: {"org/name": 1.5} if stats else {},
        loaded=lambda: ["org/name"] if stats else [],
        unwritten=lambda: 9,
        is_ready=lambda: True,
    )


def samples(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        sample.name
        + "".join(f" {value}" for name, value in sample.labels.items() if name != "model_name"): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_worker_metrics_are_the_engine_s_counters() -> None:
    metrics = worker_metrics(STATS)
    metrics.observe_step("org/name", 0.02)
    metrics.count_switch("org/name")
    with serving(metrics) as client:
        read = samples(client)
    expected = {
        "pagemill:num_requests_running": 3,
        "pagemill:num_requests_waiting": 5,
        "pagemill:num_requests_compiling": 1,
        "pagemill:kv_cache_usage_perc": 0.25,
        "pagemill:prefix_cache_queries_total": 100,
        "pagemill:prefix_cache_hits_total": 60,
        "pagemill:num_preemptions_total": 2,
        "pagemill:prompt_tokens_total": 100,
        "pagemill:generation_tokens_total": 50,
        "pagemill:request_success_total stop": 4,
        "pagemill:request_success_total length": 6,
        "pagemill:request_rejected_total": 8,
        "pagemill:unwritten_results": 9,
        "pagemill:engine_step_seconds_count": 1,
        "pagemill:engine_step_seconds_bucket 0.01": 0,
        "pagemill:engine_step_seconds_bucket 0.025": 1,
        "pagemill:worker_ready": 1,
        "pagemill:model_loaded": 1,
        "pagemill:model_load_seconds": 1.5,
        "pagemill:model_switches_total": 1,
    }
    assert {name: read[name] for name in expected} == expected
    assert read["process_resident_memory_bytes"] > 0


def test_worker_metrics_can_be_read_before_the_model_is_loaded() -> None:
    with serving(worker_metrics({})) as client:
        read = samples(client)
    assert "pagemill:num_requests_running" not in read
    assert read["pagemill:worker_ready"] == 1


def test_prometheus_may_ask_for_openmetrics() -> None:
    with serving(CourierMetrics()) as client:
        answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
def test_readyz_tells_whether_the_process_is_ready(is_ready: bool, status: int) -> None:
    with serving(CourierMetrics(), is_ready=is_ready) as client:
        assert client.get("/readyz").status_code == status
        assert client.get("/healthz").status_code == 200
        assert client.get("/else").status_code == 404


def test_metrics_server_answers_beside_a_silent_client() -> None:
    with (
        serving(CourierMetrics()) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0)),
    ):
        assert client.get("/healthz").status_code == 200
