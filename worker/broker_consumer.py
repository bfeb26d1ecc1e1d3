"""A Celery consumer for which no error of the broker is the worker's end.

Celery retries a lost connection, but ends the worker where Redis answers with an error (READONLY, OOM, NOAUTH,
MISCONF, UNBLOCKED ...). Here messages are only notifications: work is found in Postgres by polling. So each error
restarts the consumer alone, after a pause, and is reported once an outage.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds; doubles with each failure in a row
LONGEST_PAUSE = 10.0
STEADY_AFTER = 2.0  # seconds that a consumer runs before its broker counts as well again
SIGNAL_INTERVAL = 0.1  # seconds in which a pause notices that the process is to stop
CLOSE_TIMEOUT = 0.5  # seconds that closing a connection may wait for Redis


class BrokerConsumer(Consumer):  # type: ignore[misc]
    """Named in the app's configuration, `worker_consumer`; Celery's Worker makes one and runs it."""

    connection: Any  # kombu's; None between two connections

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # An exception of any kind, so that one that redis-py or kombu does not wrap is no exception to the rule.
        self.connection_errors = (Exception,)
        self._failures = 0

    def on_ready(self) -> None:
        super().on_ready()
        if self._failures:
            self.timer.call_after(STEADY_AFTER, self._note_recovery, (self.restart_count,))

    def on_connection_error_before_connected(self, error: Exception) -> None:
        self._pause(error)

    def on_connection_error_after_connected(self, error: Exception) -> None:
        connection = self.connection
        self.connection = None
        # The connection may be broken in any way: what closing it raises adds nothing to `error`.
        with contextlib.suppress(Exception):
            connection.collect(socket_timeout=CLOSE_TIMEOUT)
        with contextlib.suppress(Exception):
            connection.close()
        self._pause(error)

    def _pause(self, error: Exception) -> None:
        if self._failures == 0:
            logger.warning("no notifications, work is found by polling: %s: %s", type(error).__name__, error)
        pause = min(FIRST_PAUSE * 2.0 ** min(self._failures, 16), LONGEST_PAUSE)
        self._failures += 1
        until = time.monotonic() + pause
        while time.monotonic() < until:
            maybe_shutdown()
            time.sleep(SIGNAL_INTERVAL)

    def _note_recovery(self, restart_count: int) -> None:
        if restart_count == self.restart_count:
            logger.info("notifications arrive again")
            self._failures = 0
