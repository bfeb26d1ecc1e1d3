"""The courier process: delivers webhooks and does the periodic maintenance. It needs no torch and no engine.

Its timers are threads of their own beside a Celery worker. All work is found in Postgres; the `nudge` task only makes
it sooner. Two couriers may run at once: each skips the rows that the other has locked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from celery import Celery, bootsteps

from jobs.database import connect
from jobs.queues import COURIER_QUEUE, NUDGE_TASK
from jobs.settings import Settings
from jobs.tracing import start_tracer
from worker.app import make_app, run_solo
from worker.courier.addresses import AddressPolicy
from worker.courier.dispatcher import Dispatcher
from worker.courier.file_collection import FileCollection
from worker.courier.maintenance import Maintenance
from worker.courier.metrics import CourierMetrics
from worker.courier.periodic import Periodic
from worker.metrics_server import MetricsServer

logger = logging.getLogger(__name__)

STOP_GRACE = 1.0  # seconds for transactions and deliveries under way; what is cut off is found again
END_WITHIN = 12.0  # seconds after a signal in which the process has to end


class Courier:
    """The timers, and how they start and end together."""

    def __init__(self, settings: Settings, app: Celery) -> None:
        database = connect(settings, "pagemill courier")
        metrics = CourierMetrics()
        self._tracer = start_tracer("courier")
        self.metrics_server = MetricsServer(metrics.registry, self._is_ready)
        maintenance = Maintenance(database, settings, app, metrics)
        self._dispatcher = Dispatcher(
            database,
            settings,
            AddressPolicy(allow_private=settings.webhook_allow_private),
            metrics,
            on_free=lambda: self._webhooks.wake(),
            tracer=self._tracer,
        )

        def periodic(name: str, turn: Callable[[threading.Event], None], interval: float) -> Periodic:
            return Periodic(
                name,
                turn,
                interval=interval,
                on_turn=lambda: metrics.count_turn(name),
                on_failure=lambda: metrics.count_failed_turn(name),
            )

        self._webhooks = periodic("webhooks", self._dispatcher.turn, settings.webhook_poll_interval)
        sweeps = {
            "rescue_stalled": maintenance.rescue_stalled,
            "settle_cancelled_and_expired": maintenance.settle_cancelled_and_expired,
            "delete_old": maintenance.delete_old,
            "announce_milestones": maintenance.announce_milestones,
            "notify_waiting": maintenance.notify_waiting,
            "collect_files": FileCollection(database, settings).sweep,
        }
        self._timers = [
            self._webhooks,
            *(periodic(name, turn, settings.sweep_interval) for name, turn in sweeps.items()),
        ]

    def start(self) -> None:
        """Start every timer and return."""
        for timer in self._timers:
            timer.start()
        logger.info("the courier is at work")

    def _is_ready(self) -> bool:
        """Whether each timer's last turn went well: it does not where Postgres is away."""
        return all(timer.works for timer in self._timers)

    def nudge(self) -> None:
        """Something may be due: look now."""
        for timer in self._timers:
            timer.wake()

    def stop(self) -> None:
        """Take up nothing more, and let what is under way end within moments. Safe to call twice."""
        for timer in self._timers:
            timer.stop()
        self._dispatcher.wait(STOP_GRACE)
        for timer in self._timers:
            timer.join(STOP_GRACE / len(self._timers))
        if self._tracer is not None:
            self._tracer.close()


def run_courier(settings: Settings) -> int:
    """Run until a signal comes, then stop at once. Returns the exit code.

    Raises `DatabaseNotConfigured` or `BrokerNotConfigured`; servers that are away now are waited for.
    """
    app = make_app(settings, "pagemill.courier")
    courier = Courier(settings, app)
    if settings.metrics_port is not None:
        courier.metrics_server.start(settings.metrics_host, settings.metrics_port)

    class Timers(bootsteps.StartStopStep):  # type: ignore[misc]
        def start(self, worker: object) -> None:
            courier.start()

        def stop(self, worker: object) -> None:
            courier.stop()

        def terminate(self, worker: object) -> None:
            courier.stop()

    app.steps["worker"].add(Timers)

    @app.task(name=NUDGE_TASK)  # type: ignore[untyped-decorator]
    def nudge() -> None:
        courier.nudge()

    try:
        return run_solo(app, queues=[COURIER_QUEUE], name="courier", end_within=END_WITHIN)
    finally:
        courier.metrics_server.close()
