"""The Celery app, made on call: nothing is configured at import, so a process sees the settings that it was given."""

from __future__ import annotations

import socket
import threading
import uuid
import warnings
from collections.abc import Callable

from celery import Celery, signals
from celery.platforms import SecurityWarning

from jobs.queues import celery_config
from jobs.settings import Settings


def make_app(settings: Settings, name: str) -> Celery:
    """A Celery app that speaks JSON, keeps no results, and gives up on a dead Redis within `settings.redis_timeout`.

    It is no process-wide current app: tasks are registered on it by name. Raises `BrokerNotConfigured`.
    """
    app = Celery(name, set_as_current=False)
    app.conf.update(celery_config(settings))
    return app


def run_solo(app: Celery, *, queue: str, name: str, on_signal: Callable[[], None] = lambda: None) -> int:
    """Run a Celery worker in this process until a signal, or `celery.worker.state.should_stop`, ends it.

    `on_signal` is called in the signal's handler, at once: Celery itself looks up from Redis only within a second or
    two.

    Returns the exit code: 0 after a signal, for Ctrl-C is no failure; `should_stop` itself; 1 where Celery gave up.

    `solo` runs tasks in this very process, where the events that they set mean something. Gossip, mingle and event
    heartbeats would only make Redis matter more than it should.
    """
    signals.setup_logging.connect(_leave_logging_alone)
    # Celery warns of running as root, where pickled messages would be code: we accept JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    was_asked = threading.Event()

    def note(**_: object) -> None:
        was_asked.set()
        on_signal()

    signals.worker_shutting_down.connect(note)
    worker = app.Worker(
        hostname=f"{name}-{uuid.uuid4().hex[:8]}@{socket.gethostname()}",
        queues=[queue],
        pool="solo",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        redirect_stdouts=False,
        quiet=True,
    )
    worker.start()
    return 0 if was_asked.is_set() else int(worker.exitcode or 0)


def _leave_logging_alone(**_: object) -> None:
    """A receiver of `setup_logging` keeps Celery from configuring the process's logging its own way."""
