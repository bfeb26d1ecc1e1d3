"""A worker process: its engines, the threads around them, and the Celery worker that receives notifications.

Celery (main thread)  drain(job_id) ─▶ notify the claim loop
claims                Postgres ─▶ tokens ─▶ engine's inbox ─▶ engine thread: step ─▶ outcomes
writer                outcomes ─▶ Postgres, in groups
heartbeat, watchdog   lease; the process ends where a thread makes no progress
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from celery import bootsteps
from celery.worker import state as celery_state
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief, connect
from jobs.queries import workers
from jobs.queries.rescue import release_dead_worker
from jobs.queries.settling import ClaimToken, Outcome
from jobs.queues import DRAIN_TASK, model_queue
from jobs.requests import ModelLimits
from jobs.settings import Settings
from jobs.states import EndReason, Wanted
from jobs.tracing import start_tracer
from worker.app import make_app, run_solo
from worker.generation.claim_loop import ClaimLoop
from worker.generation.claim_spans import ClaimSpans
from worker.generation.engine_roster import EngineRoster, ServedModel
from worker.generation.engine_thread import CLOSE_TIMEOUT, EngineCallbacks
from worker.generation.heartbeat import Heartbeat
from worker.generation.lease import Lease
from worker.generation.live import LiveAnswers
from worker.generation.metrics import WorkerMetrics
from worker.generation.tokenizer_server import TokenizerServer
from worker.generation.turns import Turns
from worker.generation.vital_thread import VitalThread
from worker.generation.writer import Writer
from worker.metrics_server import MetricsServer

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

    def __init__(self, settings: Settings, models: Sequence[ServedModel], *, device: str) -> None:
        names = [model.name for model in models]
        tracer = start_tracer("worker")
        self._spans = None if tracer is None else ClaimSpans(tracer)
        self._settings = settings
        self._database = connect(settings, f"pagemill worker {names[0]}")
        self._lease = Lease(fence_after=settings.fence_after)
        self._writer = Writer(
            self._database,
            self._lease,
            interval=settings.write_interval,
            on_crash=self._on_crash,
            on_all_written=lambda: self._claims.notify(),
        )
        self._live = LiveAnswers(settings, models=names, on_cancel=lambda job_id: self._engine.abort_job(job_id))
        self._metrics = WorkerMetrics(
            names,
            stats=lambda: self._engine.stats_by_model(),
            load_seconds=lambda: self._engine.load_seconds(),
            loaded=lambda: self._engine.loaded(),
            unwritten=lambda: len(self._writer.unwritten()),
            is_ready=self._is_ready,
        )
        self.metrics_server = MetricsServer(self._metrics.registry, self._is_ready)
        self._engine = EngineRoster(
            models,
            lambda model: EngineCallbacks(
                on_outcome=self._on_outcome,
                on_preparing=lambda: self._claims.thread.note_progress(),
                on_capacity=self._on_capacity,
                on_idle=self._writer.flush_soon,
                on_fatal=self._on_fatal,
                on_step=partial(self._metrics.observe_step, model),
            ),
            on_ready=self._on_ready,
            on_switched=self._on_switched,
            on_crash=self._on_crash,
            share_prefixes=settings.share_prefixes,
            times_lines=settings.line_timing,
            live=self._live,
            kept_bytes=settings.kept_model_bytes,
        )
        self._tokenizer = TokenizerServer(settings, tokenizer=self._engine.tokenizer)
        self._claims = ClaimLoop(
            self._database,
            self._lease,
            settings,
            consumer=self._engine,
            turns=Turns(names, switch_after=settings.model_switch_after, cost=self._engine.switch_cost)
            if len(names) > 1
            else None,
            unwritten=self._writer.unwritten,
            spans=self._spans,
            on_crash=self._on_crash,
        )
        self._heartbeat = Heartbeat(
            self._database,
            self._lease,
            settings,
            device=device,
            turn=lambda: self._engine.turn,
            stats=self._engine.stats,
            on_change=self._claims.notify,
            on_wanted=self._on_wanted,
            on_crash=self._on_crash,
        )
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stop_lock = threading.Lock()
        self._started = False
        self._stopped = threading.Event()
        self._broken_at: float | None = None  # monotonic
        self._gives_back = False  # what runs, at once

    @property
    def exit_code(self) -> int:
        """What the process should end with."""
        return EXIT_OK if self._broken_at is None else EXIT_BROKEN

    def _is_ready(self) -> bool:
        """Whether every model was loaded once and this worker may claim and write."""
        return self._lease.is_good

    def start(self) -> None:
        """Begin to load the models, and return at once: Celery only stops what has started in full."""
        self._started = True
        self._writer.start()
        self._live.start()
        self._engine.start()
        self._watchdog.start()

    def notify(self) -> None:
        """Work may be waiting."""
        self._claims.notify()

    def stop_claiming(self) -> None:
        """Claim nothing more, as the first part of `stop`. Safe in a signal's handler."""
        self._claims.stop()

    def stop(self, *, drain: float) -> None:
        """Claim nothing more, let what runs finish for `drain` seconds, write it, give the rest back, and end.

        What is given back is not charged a death. Safe to call twice, and before `start`.
        """
        with self._stop_lock:
            if self._stopped.is_set() or not self._started:
                return
            self._claims.close()
            if self._broken_at is None and not self._engine.drain(0 if self._gives_back else drain):
                logger.info("%d requests did not finish in time; they go back", len(self._engine.held()))
            self._engine.close()
            self._writer.close(WRITE_TIMEOUT)
            self._live.close()
            self._tokenizer.close()
            self._heartbeat.close()
            self._sign_off()
            if self._spans is not None:
                self._spans.close()
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

    def _on_ready(self, models: Sequence[ModelLimits]) -> None:
        self._heartbeat.start(models)
        self._claims.start()
        self._tokenizer.start(models)

    def _on_switched(self, model: str) -> None:
        self._metrics.count_switch(model)
        self._claims.notify()

    def _on_outcome(self, outcome: Outcome) -> None:
        # To the writer first: what its caller has seen is then on its way to Postgres.
        self._writer.put(outcome)
        self._live.finish(outcome)
        if self._spans is not None:
            self._spans.end(outcome)

    def _on_wanted(self, wanted: Wanted | None) -> None:
        """From the heartbeat: an operator drains this worker, stops it, or takes that back."""
        logger.info("an operator wants of this worker: %s", wanted or "to go on")
        if wanted is Wanted.STOP:
            self._gives_back = True
            celery_state.should_stop = EXIT_OK
        elif wanted is Wanted.DRAIN:
            self._claims.pause(self._on_drained)
        else:
            self._claims.resume()

    def _on_drained(self) -> None:
        """From the claim loop: nothing runs, and everything is written."""
        logger.info("this worker is drained, and ends")
        celery_state.should_stop = EXIT_OK

    def _on_capacity(self) -> None:
        self._claims.claim_again_if_more()

    def _on_fatal(self, error: BaseException, *, is_understood: bool) -> None:
        logger.critical("the engine ends: %s", error, exc_info=None if is_understood else error)
        # Finished requests are written first: they must neither run again nor be charged with this failure.
        self._writer.flush(WRITE_TIMEOUT)
        # With nothing running, a queued request may be what breaks each engine that it reaches: all are charged.
        self._break_off(self._engine.suspects() or None)

    def _on_crash(self, error: BaseException) -> None:
        # The traceback without the message, which may quote a prompt.
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
        """Free all that this worker holds, for good. Suspects are charged with its death; None: all are."""
        self._heartbeat.stop_beating()
        worker_id = self._lease.end()
        if worker_id is None:
            return
        try:
            with self._database.begin() as connection:
                release_dead_worker(
                    connection,
                    worker_id,
                    max_deaths=self._settings.max_deaths,
                    reason=EndReason.BROKEN,
                    suspects=suspects,
                )
        except SQLAlchemyError as error:
            logger.warning("could not free what is held, the lease will run out instead: %s", brief(error))

    def _vital_threads(self) -> Iterator[tuple[VitalThread, Callable[[], Collection[ClaimToken]]]]:
        """The threads without which nothing gets done, and the requests to blame where one of them hangs."""
        yield self._claims.thread, self._engine.in_preparation
        yield self._writer.thread, list
        if self._heartbeat.thread is not None:
            yield self._heartbeat.thread, list

    def _watch(self) -> None:
        # Liveness means progress: a heartbeat proves nothing about an engine that hangs in a driver call.
        limit = self._settings.watchdog
        while not self._stopped.wait(WATCH_INTERVAL):
            if self._engine.stalled_for() > limit:
                logger.critical("the engine made no step for %.0f s; this process ends", limit)
                self._give_up(self._engine.suspects())
                os._exit(EXIT_BROKEN)
            for thread, suspects in self._vital_threads():
                if thread.stalled_for() > limit:
                    logger.critical("the %s thread made no progress for %.0f s; this process ends", thread.name, limit)
                    self._give_up(suspects())
                    os._exit(EXIT_BROKEN)
            if self._broken_at is not None and time.monotonic() - self._broken_at > limit:
                logger.critical("this process did not end within %.0f s of breaking, and ends now", limit)
                os._exit(EXIT_BROKEN)


def run_worker(settings: Settings, models: Sequence[ServedModel], *, device: str) -> int:
    """Serve a model, or several in turn, until a signal comes or an engine breaks. Returns the exit code.

    SIGTERM lets what runs finish for `settings.drain_deadline` seconds; SIGINT and SIGQUIT give it back at once.
    """
    service = GenerationService(settings, models, device=device)
    if settings.metrics_port is not None:
        service.metrics_server.start(settings.metrics_host, settings.metrics_port)

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
        service.notify()

    code = run_solo(
        app,
        queues=[model_queue(model.name) for model in models],
        name=models[0].name,
        end_within=settings.drain_deadline + END_WITHIN,
        on_signal=service.stop_claiming,
    )
    # Where Celery could not start in full it stops nothing.
    service.stop(drain=0)
    service.metrics_server.close()
    return service.exit_code or code
