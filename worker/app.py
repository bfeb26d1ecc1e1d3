"""The Celery app, made on call: nothing is configured at import, so a process sees the settings that it was given."""

from __future__ import annotations

import faulthandler
import socket
import uuid
import warnings
from collections.abc import Callable, Sequence

from celery import Celery, signals
from celery.platforms import SecurityWarning

from jobs.queues import celery_config
from jobs.settings import Settings


def make_app(settings: Settings, name: str) -> Celery:
    """A Celery app that speaks JSON, keeps no results, and gives up on a dead Redis within `settings.redis_timeout`.

    It is no process-wide current app: tasks are registered on it by name. Raises `BrokerNotConfigured`.
    """
    app = Celery(name, set_as_current=False)
    app.conf.update(celery_config(settings), worker_consumer="worker.broker_consumer:BrokerConsumer")
    return app


def run_solo(
    app: Celery, *, queues: Sequence[str], name: str, end_within: float, on_signal: Callable[[], None] = lambda: None
) -> int:
    """Run a Celery worker in this process until a signal, or `celery.worker.state.should_stop`, ends it.

    `on_signal` is called in the signal's handler, at once: Celery itself looks up from Redis only within a second or
    two. A process that still lives `end_within` seconds after its first signal, returned from here or not, writes to
    standard error where each of its threads stands, and ends with status 1.

    Returns the exit code: 0 after a signal, for Ctrl-C is no failure; `should_stop` itself; 1 where Celery gave up.

    `solo` runs tasks in this very process, where the events that they set mean something. Gossip, mingle and event
    heartbeats would only make Redis matter more than it should.
    """
    signals.setup_logging.connect(_leave_logging_alone)
    # Celery warns of running as root, where pickled messages would be code: we accept JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    was_asked = False

    def note(**_: object) -> None:
        # In a handler, which the next signal may interrupt: nothing here takes a lock.
        nonlocal was_asked
        if not was_asked:
            # A thread outside of the interpreter: what holds up Python's threads, or its end, does not hold up this.
            faulthandler.dump_traceback_later(end_within, exit=True)
        was_asked = True
        on_signal()

    signals.worker_shutting_down.connect(note)
    worker = app.Worker(
        hostname=f"{name}-{uuid.uuid4().hex[:8]}@{socket.gethostname()}",
        queues=list(queues),
        pool="solo",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        redirect_stdouts=False,
        quiet=True,
    )
    worker.start()
    return 0 if was_asked else int(worker.exitcode or 0)


def _leave_logging_alone(**_: object) -> None:
    """A receiver of `setup_logging` keeps Celery from configuring the process's logging its own way."""
