"""The courier's metrics: webhook attempts and the rescue of what dead workers held."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from worker.metrics_server import new_registry

ATTEMPT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)  # seconds


class CourierMetrics:
    """The registry of a courier, and what its parts count in it."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self._attempts = Counter(
            "pagemill:webhook_attempts",
            "Webhook attempts by outcome: delivered, retry (tried again later) or given_up.",
            ("outcome",),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pagemill:webhook_attempt_seconds",
            "Seconds of one webhook attempt, name resolution included.",
            registry=self.registry,
            buckets=ATTEMPT_BUCKETS,
        )
        self._dead_workers = Counter("pagemill:dead_workers", "Workers whose lease ran out.", registry=self.registry)
        self._rescued = Counter(
            "pagemill:rescued_requests",
            "Requests of dead workers by outcome: freed (they wait again) or given_up.",
            ("outcome",),
            registry=self.registry,
        )
        self._turns = Counter(
            "pagemill:courier_turns",
            "Turns of the courier's periodic tasks that went well, by task.",
            ("task",),
            registry=self.registry,
        )
        self._failed_turns = Counter(
            "pagemill:courier_failed_turns",
            "Turns of the courier's periodic tasks that failed, by task.",
            ("task",),
            registry=self.registry,
        )
        for outcome in ("delivered", "retry", "given_up"):
            self._attempts.labels(outcome)
        for outcome in ("freed", "given_up"):
            self._rescued.labels(outcome)

    def count_attempt(self, outcome: str) -> None:
        """Count an attempt whose outcome is written: `delivered`, `retry` or `given_up`."""
        self._attempts.labels(outcome).inc()

    def observe_attempt(self, seconds: float) -> None:
        """Record how long an attempt took."""
        self._seconds.observe(seconds)

    def count_rescue(self, *, freed: int, given_up: int) -> None:
        """Count a dead worker and what it held."""
        self._dead_workers.inc()
        self._rescued.labels("freed").inc(freed)
        self._rescued.labels("given_up").inc(given_up)

    def count_turn(self, task: str) -> None:
        """Count a turn of a periodic task that went well."""
        self._turns.labels(task).inc()

    def count_failed_turn(self, task: str) -> None:
        """Count a failed turn of a periodic task."""
        self._failed_turns.labels(task).inc()
