"""Deliveries that are due become attempts, several at once, and what came of each is written down."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpcore
from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief
from jobs.ids import BATCH_PREFIX, EVENT_PREFIX, JOB_PREFIX, public_id
from jobs.queries import webhooks
from jobs.queries.webhooks import DueDelivery
from jobs.settings import Settings
from worker.courier.addresses import AddressPolicy
from worker.courier.delivery import WebhookResponse, attempt
from worker.courier.metrics import CourierMetrics

if TYPE_CHECKING:
    from jobs.spans import Tracer

logger = logging.getLogger(__name__)

JITTER = 0.2  # of each delay, either way
ENDPOINT_SHARE = 4  # one endpoint gets a quarter of the places: a receiver that hangs holds up itself
RECORD_MARGIN = 30.0  # seconds beyond an attempt's own limit in which its outcome may be written
RECORD_AGAIN = 1.0  # seconds


class Dispatcher:
    """Runs at most `settings.webhook_concurrency` attempts, each in a thread of its own.

    `on_free` is called after each, when another may begin.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        policy: AddressPolicy,
        metrics: CourierMetrics,
        *,
        on_free: Callable[[], None],
        tracer: Tracer | None = None,
    ) -> None:
        self._database = database
        self._settings = settings
        self._policy = policy
        self._metrics = metrics
        self._on_free = on_free
        self._tracer = tracer
        self._hold = settings.webhook_timeout + RECORD_MARGIN
        self._per_endpoint = max(1, settings.webhook_concurrency // ENDPOINT_SHARE)
        self._tls = httpcore.default_ssl_context()
        self._lock = threading.Condition()
        self._under_way: dict[int, UUID] = {}  # delivery → endpoint

    def turn(self, stopping: threading.Event) -> None:
        """Begin attempts until nothing is due or every place is taken."""
        while not stopping.is_set():
            with self._lock:
                under_way = list(self._under_way.values())
            free = self._settings.webhook_concurrency - len(under_way)
            if free == 0:
                return
            with self._database.begin() as connection:
                due = webhooks.take_due(
                    connection, limit=free, per_endpoint=self._per_endpoint, under_way=under_way, hold=self._hold
                )
            for delivery in due:
                self._begin(delivery)
            if not due:
                return

    def wait(self, timeout: float) -> None:
        """Wait until no attempt is under way. One that is cut off is made again, under the same id."""
        with self._lock:
            if not self._lock.wait_for(lambda: not self._under_way, timeout):
                logger.info("%d deliveries are left for the next courier", len(self._under_way))

    def _begin(self, delivery: DueDelivery) -> None:
        with self._lock:
            self._under_way[delivery.id] = delivery.endpoint_id
        threading.Thread(target=self._attempt, args=(delivery,), name=f"delivery {delivery.id}", daemon=True).start()

    def _attempt(self, delivery: DueDelivery) -> None:
        began = time.monotonic()
        try:
            try:
                answer = self._traced_attempt(delivery)
            except Exception:
                logger.exception("event %s: the attempt itself failed", _name(delivery), extra=_ids(delivery))
                answer = WebhookResponse(error="internal error of the courier")
            took = time.monotonic() - began
            self._metrics.observe_attempt(took)
            self._record(delivery, answer, round(took * 1000), began + self._hold)
        finally:
            with self._lock:
                del self._under_way[delivery.id]
                self._lock.notify_all()
            self._on_free()

    def _traced_attempt(self, delivery: DueDelivery) -> WebhookResponse:
        """Make an attempt. With a tracer it is a span, which the receiver hears of, in the trace of the submission."""
        limits: dict[str, Any] = {"timeout": self._settings.webhook_timeout, "tls": self._tls}
        if self._tracer is None:
            return attempt(delivery, self._policy, **limits)
        from jobs.spans import Kind

        span = self._tracer.start(
            "deliver webhook",
            Kind.CLIENT,
            parent=delivery.traceparent,
            attributes={
                **{f"pagemill.{name.replace('_', '.')}": value for name, value in _ids(delivery).items()},
                "pagemill.event.type": delivery.event_type,
                "pagemill.attempt": delivery.attempt,
            },
        )
        answer = WebhookResponse(error="internal error of the courier")
        try:
            answer = attempt(replace(delivery, traceparent=span.traceparent), self._policy, **limits)
        finally:
            span.end({"http.response.status_code": answer.status or 0}, error=answer.error)
        return answer

    def _record(self, delivery: DueDelivery, answer: WebhookResponse, milliseconds: int, until: float) -> None:
        while True:
            try:
                with self._database.begin() as connection:
                    webhooks.log_attempt(
                        connection,
                        delivery,
                        milliseconds=milliseconds,
                        status=answer.status,
                        error=answer.error,
                        answer=answer.answer,
                    )
                    outcome = self._write(connection, delivery, answer)
                self._metrics.count_attempt(outcome)
                return
            except SQLAlchemyError as error:
                if time.monotonic() > until:
                    logger.error(
                        "event %s is attempted once more, its outcome was lost",
                        _name(delivery),
                        extra=_ids(delivery),
                    )
                    return
                logger.warning(
                    "event %s: its outcome is not written yet: %s",
                    _name(delivery),
                    brief(error),
                    extra=_ids(delivery),
                )
            time.sleep(RECORD_AGAIN)

    def _write(self, connection: Connection, delivery: DueDelivery, answer: WebhookResponse) -> str:
        """Write down what came of an attempt. Returns its outcome, as `CourierMetrics.count_attempt` has them."""
        name, number = _name(delivery), delivery.attempt
        if answer.error is None:
            assert answer.status is not None
            webhooks.mark_delivered(connection, delivery.id, status=answer.status)
            logger.info("event %s: delivered, attempt %d, status %d", name, number, answer.status, extra=_ids(delivery))
            return "delivered"
        delay = next_delay(self._settings.webhook_schedule, number, answer, spread=random.uniform(-JITTER, JITTER))
        if answer.is_final or delivery.is_test or delay is None:
            webhooks.give_up(
                connection,
                delivery.id,
                attempt=number,
                status=answer.status,
                error=answer.error,
                disable=answer.is_gone,
            )
            logger.warning("event %s: given up after attempt %d: %s", name, number, answer.error, extra=_ids(delivery))
            return "given_up"
        webhooks.put_off(connection, delivery.id, attempt=number, delay=delay, status=answer.status, error=answer.error)
        logger.info(
            "event %s: attempt %d failed, next in %.0f s: %s",
            name,
            number,
            delay,
            answer.error,
            extra=_ids(delivery),
        )
        return "retry"


def next_delay(schedule: Sequence[float], attempt: int, answer: WebhookResponse, *, spread: float) -> float | None:
    """Seconds until the attempt after number `attempt`, or None where that was the last.

    `spread` (-0.2 … 0.2) is this attempt's jitter. A receiver that asked for more time gets it.
    """
    if attempt >= len(schedule):
        return None
    return max(schedule[attempt] * (1 + spread), answer.retry_after or 0.0)


def _name(delivery: DueDelivery) -> str:
    return public_id(EVENT_PREFIX, delivery.event_id)


def _ids(delivery: DueDelivery) -> dict[str, str]:
    """What a structured log names: the event, and its job or batch."""
    fields = {"event_id": _name(delivery)}
    if delivery.job_id is not None:
        fields["job_id"] = public_id(JOB_PREFIX, delivery.job_id)
    if delivery.batch_id is not None:
        fields["batch_id"] = public_id(BATCH_PREFIX, delivery.batch_id)
    return fields
