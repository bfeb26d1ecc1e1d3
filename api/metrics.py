"""The API's metrics: its requests by route and status, its notifications, and the backlog of every model."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.notifier import Notifier
from jobs.queries.backlog import Backlog, ModelBacklog

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OTHER = "other"
"""The route of a request that no route took, and the method that HTTP does not know: labels stay few."""

GAUGES = {
    "jobs": ("pagemill:open_jobs", "Jobs in progress."),
    "pending": ("pagemill:queue_depth", "Lines that wait for a worker."),
    "running": ("pagemill:queue_running", "Lines that workers hold."),
    "pending_tokens": ("pagemill:pending_tokens", "Tokens of the lines that wait, by the mean of settled lines."),
    "oldest_seconds": ("pagemill:queue_age_seconds", "Age of the oldest job with a line that waits."),
    "live_workers": ("pagemill:live_workers", "Workers that hold a lease."),
}


class HttpMetrics:
    """Counts requests as the middleware sees them end."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Counter(
            "pagemill:http_requests",
            "Requests by route and status; status 0: no answer began.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pagemill:http_request_seconds",
            "Seconds from a request's head to the end of its answer; long polls and uploads count whole.",
            ("route",),
            registry=self.registry,
            buckets=SECONDS,
        )

    def observe(self, method: str, route: str | None, status: int | None, seconds: float) -> None:
        """Count a request. `route` is the path as the code has it, with names in braces and never with values."""
        route = route or OTHER
        self._requests.labels(method if method in METHODS else OTHER, route, str(status or 0)).inc()
        self._seconds.labels(route).observe(seconds)


class BacklogCollector(Collector):
    """One look at the queues and the notifier. `backlog` is None where Postgres did not answer."""

    def __init__(self, backlog: Backlog | None, notifier: Notifier) -> None:
        self._backlog = backlog
        self._notifier = notifier

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "pagemill:database_up", "1 where Postgres answered this scrape.", float(self._backlog is not None)
        )
        yield CounterMetricFamily("pagemill:notifications_sent", "Notifications to workers.", self._notifier.sent)
        yield CounterMetricFamily(
            "pagemill:notifications_lost", "Notifications that Redis did not take.", self._notifier.failed
        )
        if self._backlog is None:
            return
        yield GaugeMetricFamily("pagemill:webhooks_due", "Webhook deliveries that are due.", self._backlog.webhooks_due)
        for field, (name, meaning) in GAUGES.items():
            yield _by_model(name, meaning, field, self._backlog.models)


def _by_model(name: str, meaning: str, field: str, models: list[ModelBacklog]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=("model_name",))
    for model in models:
        family.add_metric((model.model,), getattr(model, field))
    return family
