"""A worker: one engine, the threads around it, and the Celery worker that hears the bell.

    Celery (main thread)  drain(job_id) ─▶ ring
    claims                Postgres ─▶ tokens ─▶ engine's inbox
    engine                inbox ─▶ step ─▶ outcomes
    writer                outcomes ─▶ Postgres, in groups
    heartbeat             lease, watchdog

Everything is started by a bootstep of Celery's *Worker* blueprint: that of the Consumer restarts at every loss of the
broker, and work does not depend on the broker.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Collection

from celery import bootsteps
from celery.worker import state as celery_state
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief, connect
from jobs.queries import workers
from jobs.queries.settling import ClaimToken, release_dead_worker
from jobs.queues import DRAIN_TASK, model_queue
from jobs.requests import ModelLimits
from jobs.settings import Settings
from worker.app import make_app, run_solo
from worker.generation.claim_loop import ClaimLoop
from worker.generation.engine_thread import CLOSE_TIMEOUT, EngineCallbacks, EngineThread, LoadEngine
from worker.generation.heartbeat import Heartbeat
from worker.generation.lease import Lease
from worker.generation.writer import Writer

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_BROKEN = 1
WATCH_INTERVAL = 1.0  # seconds
WRITE_TIMEOUT = 10.0  # seconds for the last results, once the engine has stopped
# Seconds in which the process has to end once its requests may run no longer. A slow step, and a slow Postgres after
# it, are not yet a hang: a process that is cut off leaves all that it holds to be charged with a death.
END_WITHIN = CLOSE_TIMEOUT + WRITE_TIMEOUT + 4.0


class GenerationService:
    """The threads of a worker, and how they start and end together."""

    def __init__(self, settings: Settings, load: LoadEngine, *, model: str, device: str) -> None:
        self._settings = settings
        self._database = connect(settings, f"pagemill worker {model}")
        self._lease = Lease(fence_after=settings.fence_after)
        self._writer = Writer(
            self._database,
            self._lease,
            interval=settings.write_interval,
            crashed=self._on_crashed,
            on_all_written=lambda: self._claims.ring(),
        )
        self._owner = EngineThread(
            load,
            EngineCallbacks(
                loaded=self._on_loaded,
                outcome=self._writer.put,
                room=self._on_room,
                idle=self._writer.flush_soon,
                broken=self._on_broken,
            ),
            model=model,
            share_prefixes=settings.share_prefixes,
        )
        self._claims = ClaimLoop(
            self._database,
            self._lease,
            settings,
            model=model,
            consumer=self._owner,
            unwritten=self._writer.unwritten,
            crashed=self._on_crashed,
        )
        self._heartbeat = Heartbeat(
            self._database,
            self._lease,
            settings,
            device=device,
            stats=self._owner.stats,
            on_change=self._claims.ring,
            crashed=self._on_crashed,
        )
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stop_lock = threading.Lock()
        self._started = False
        self._stopped = threading.Event()
        self._broken_at: float | None = None  # monotonic

    @property
    def exit_code(self) -> int:
        """What the process should end with."""
        return EXIT_OK if self._broken_at is None else EXIT_BROKEN

    def start(self) -> None:
        """Begin to load the model, and return at once: Celery only stops what has started in full."""
        self._started = True
        self._writer.start()
        self._owner.start()
        self._watchdog.start()

    def ring(self) -> None:
        """Work may be waiting."""
        self._claims.ring()

    def stop_claiming(self) -> None:
        """What comes before `stop`, as soon as a signal says that it will come. Safe in the signal's handler."""
        self._claims.stop()

    def stop(self, *, drain: float) -> None:
        """Claim nothing more, let what runs finish for `drain` seconds, write it, give the rest back, and end.

        What is given back is not charged a death. Safe to call twice, and before `start`.
        """
        with self._stop_lock:
            if self._stopped.is_set() or not self._started:
                return
            self._claims.close()
            if self._broken_at is None and not self._owner.drain(drain):
                logger.info("%d requests did not finish in time; they go back", len(self._owner.held()))
            self._owner.close()
            self._writer.close(WRITE_TIMEOUT)
            self._heartbeat.close()
            self._sign_off()
            self._stopped.set()

    def _sign_off(self) -> None:
        worker_id = self._lease.worker_id
        if worker_id is None:
            return
        try:
            with self._database.begin() as connection:
                given_back = workers.end(connection, worker_id)
        except SQLAlchemyError as error:
            logger.warning("could not sign off, the lease will run out instead: %s", brief(error))
        else:
            logger.info("signed off; %d requests went back", given_back)

    def _on_loaded(self, model: ModelLimits) -> None:
        logger.info("%s is loaded: context %d, vocabulary %d", model.name, model.max_model_len, model.vocab_size)
        self._heartbeat.start(model)
        self._claims.start()

    def _on_room(self) -> None:
        self._claims.refill()

    def _on_broken(self, error: BaseException, *, is_understood: bool) -> None:
        logger.critical("the engine ends: %s", error, exc_info=None if is_understood else error)
        # What is finished is not to be run again, nor charged with what came after it.
        self._writer.flush(WRITE_TIMEOUT)
        # Where nothing was being computed, one that waits may be what breaks every engine that it comes to.
        self._break_off(self._owner.suspects() or None)

    def _on_crashed(self, error: BaseException) -> None:
        # Where, not what it said: nobody expected this error, and its message may quote a prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        name = threading.current_thread().name
        logger.critical("the %s thread crashed, and this worker ends: %s\n%s", name, type(error).__name__, where)
        self._break_off(None)

    def _break_off(self, suspects: Collection[ClaimToken] | None) -> None:
        self._broken_at = time.monotonic()
        self._give_up(suspects)
        # Read by Celery's main loop, which then stops everything in order.
        celery_state.should_stop = EXIT_BROKEN

    def _give_up(self, suspects: Collection[ClaimToken] | None) -> None:
        """Free what this worker holds, for good. Suspects are charged, for one of them may be to blame; None: all."""
        self._heartbeat.stop_beating()
        worker_id = self._lease.end()
        if worker_id is None:
            return
        try:
            with self._database.begin() as connection:
                release_dead_worker(connection, worker_id, max_deaths=self._settings.max_deaths, suspects=suspects)
        except SQLAlchemyError as error:
            logger.warning("could not free what is held, the lease will run out instead: %s", brief(error))

    def _watch(self) -> None:
        # Liveness means progress: a heartbeat proves nothing about an engine that hangs in a driver call.
        limit = self._settings.watchdog
        while not self._stopped.wait(WATCH_INTERVAL):
            if self._owner.stalled_for() > limit:
                logger.critical("the engine made no step for %.0f s; this process ends", limit)
                self._give_up(self._owner.suspects())
                os._exit(EXIT_BROKEN)
            if self._broken_at is not None and time.monotonic() - self._broken_at > limit:
                logger.critical("this process did not end within %.0f s of breaking, and ends now", limit)
                os._exit(EXIT_BROKEN)


def run_worker(settings: Settings, load: LoadEngine, *, model: str, device: str) -> int:
    """Serve a model under the name `model` until a signal comes or the engine breaks. Returns the exit code.

    SIGTERM lets what runs finish for `settings.drain_deadline` seconds; SIGINT and SIGQUIT give it back at once.
    """
    service = GenerationService(settings, load, model=model, device=device)

    class Generation(bootsteps.StartStopStep):  # type: ignore[misc]
        def start(self, worker: object) -> None:
            service.start()

        def stop(self, worker: object) -> None:
            service.stop(drain=settings.drain_deadline)

        def terminate(self, worker: object) -> None:
            service.stop(drain=0)

    app = make_app(settings, "pagemill.worker")
    app.steps["worker"].add(Generation)

    @app.task(name=DRAIN_TASK)  # type: ignore[untyped-decorator]
    def drain(job_id: str) -> None:
        service.ring()

    code = run_solo(
        app,
        queue=model_queue(model),
        name=model,
        end_within=settings.drain_deadline + END_WITHIN,
        on_signal=service.stop_claiming,
    )
    # Where Celery could not start in full it stops nothing.
    service.stop(drain=0)
    return service.exit_code or code
