"""Periodic maintenance, found in Postgres and done in small transactions.

Each task has a thread of its own (`worker.courier.process`), because a million lines to be cancelled must not keep a
dead worker's requests waiting.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from uuid import UUID

from celery import Celery
from kombu import Connection as Broker
from kombu.exceptions import ChannelError, OperationalError
from redis.exceptions import RedisError
from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.ids import EVENT_PREFIX, JOB_PREFIX, public_id
from jobs.queries import (
    audit,
    batches,
    creations,
    explaining,
    milestones,
    reading,
    rescue,
    retention,
    settling,
    webhook_endpoints,
    webhooks,
)
from jobs.queries.milestones import Milestone
from jobs.queues import DRAIN_TASK, model_queue
from jobs.settings import Settings
from worker.courier.metrics import CourierMetrics
from worker.courier.periodic import is_away

logger = logging.getLogger(__name__)

JOBS_A_ROUND = 100  # jobs that are ended side by side, a chunk each
MODELS_A_ROUND = 1000
MILESTONES_A_ROUND = 1000
PATIENCE = 3  # heartbeats that a worker may take to be heard again after an outage of Postgres
MINUTES_KEPT = 25 * 3600.0  # seconds; a page shows 24 hours
WORKERS_KEPT = 7 * 86400.0  # seconds that a worker's row outlives it, for an operator who looks into an incident


class Maintenance:
    """Each public method is one task: it ends when nothing is left to do or `stopping` is set, and raises errors.

    rescue_stalled                  requests of workers whose lease is over wait again, or are given up
    settle_cancelled_and_expired    open requests of jobs that are cancelled or out of time are settled
    delete_old                      cut uploads, jobs past their retention, rows of deleted jobs, old workers, audit
    announce_milestones             webhooks that subscribed hear how far jobs are, and which stand still
    notify_waiting                  workers of models with waiting requests may have missed a notification
    """

    def __init__(self, database: Database, settings: Settings, app: Celery, metrics: CourierMetrics) -> None:
        self._database = database
        self._settings = settings
        self._app = app
        self._metrics = metrics
        self._is_broker_away = False
        self._is_postgres_away = True  # as far as a courier that just started can tell
        self._rescue_from = 0.0

    def rescue_stalled(self, stopping: threading.Event) -> None:
        """Free what dead workers held, one worker a transaction.

        While Postgres was away no lease could be renewed. Live workers must not be charged for that: they get
        `PATIENCE` heartbeats after it is back, before the first is taken for dead.
        """
        while not stopping.is_set():
            try:
                with self._database.begin() as connection:
                    if self._is_postgres_away:
                        self._is_postgres_away = False
                        self._rescue_from = time.monotonic() + PATIENCE * self._settings.heartbeat_interval
                    if time.monotonic() < self._rescue_from:
                        return
                    reaped = rescue.reap_worker(connection, max_deaths=self._settings.max_deaths)
            except SQLAlchemyError as error:
                self._is_postgres_away = is_away(error)
                raise
            if reaped is None:
                return
            self._metrics.count_rescue(freed=reaped.freed, given_up=reaped.given_up)
            logger.warning(
                "worker %s died: %d requests wait again, %d are given up",
                reaped.worker_id,
                reaped.freed,
                reaped.given_up,
                extra={"worker_id": str(reaped.worker_id)},
            )

    def settle_cancelled_and_expired(self, stopping: threading.Event) -> None:
        """Settle what is open in jobs that are cancelled or out of time; they take turns, so that none waits long."""
        while not stopping.is_set():
            with self._database.begin() as connection:
                job_ids = settling.jobs_to_settle(connection, limit=JOBS_A_ROUND)
            written = 0
            for job_id in job_ids:
                if stopping.is_set():
                    return
                with self._database.begin() as connection:
                    settled = settling.settle_open(connection, job_id, limit=self._settings.sweep_chunk)
                written += settled.written
                if settled.ended_jobs:
                    name = public_id(JOB_PREFIX, job_id)
                    logger.info("%s was ended, its last open requests settled", name, extra={"job_id": name})
            if written == 0:
                return

    def delete_old(self, stopping: threading.Event) -> None:
        """Hide what is abandoned or old, then remove the rows of what is hidden."""
        with self._database.begin() as connection:
            abandoned = retention.collect_abandoned(
                connection,
                staging_timeout=self._settings.staging_timeout,
                open_job_expiry=self._settings.open_job_expiry,
            )
        with self._database.begin() as connection:
            retired = retention.retire_old(connection, retention=self._settings.retention)
            batches.retire(connection, retention=self._settings.retention)
            creations.forget_expired(connection)
            webhook_endpoints.forget_tests(connection, retention=self._settings.retention)
            audit.forget_old(connection, retention=self._settings.audit_retention)
        with self._database.begin() as connection:
            retention.forget_workers(connection, retention=WORKERS_KEPT)
            retention.forget_minutes(connection, retention=MINUTES_KEPT)
        if abandoned or retired:
            logger.info("%d uploads that were cut and %d old jobs are removed", abandoned, retired)
        with self._database.begin() as connection:
            ended = webhooks.give_up_deleted(connection)
        for event_id in ended:
            logger.warning("event %s: given up, its job was deleted", public_id(EVENT_PREFIX, event_id))
        while not stopping.is_set():
            with self._database.begin() as connection:
                if not retention.remove_deleted(connection, limit=self._settings.sweep_chunk):
                    return

    def announce_milestones(self, stopping: threading.Event) -> None:
        """Announce what jobs have reached, and those that stand still with the reason, a transaction each."""
        with self._database.begin() as connection:
            milestones.announce(connection, milestones.reached(connection, limit=MILESTONES_A_ROUND))
        with self._database.begin() as connection:
            standing = milestones.standing(connection, seconds=self._settings.stalled_after, limit=MILESTONES_A_ROUND)
        for tenant_id, job_id in standing:
            if stopping.is_set():
                return
            with self._database.begin() as connection:
                self._announce_standstill(connection, tenant_id, job_id)

    def _announce_standstill(self, connection: Connection, tenant_id: UUID, job_id: UUID) -> None:
        job = reading.get_job(connection, tenant_id, job_id)
        if job is None:
            return
        queue = explaining.read_model_queue(
            connection,
            job.model,
            limit=self._settings.claim_limit,
            solo_after_deaths=self._settings.solo_after_deaths,
        )
        wait = explaining.explain(job, queue)
        if wait is not None:
            reason = {"code": wait.code, "text": wait.text, "args": wait.args}
            milestones.announce(connection, [Milestone(job_id, milestones.STALLED, reason)])

    def notify_waiting(self, stopping: threading.Event) -> None:
        """Notify the workers of each model with waiting requests. Without a broker their next poll finds the work."""
        with self._database.begin() as connection:
            waiting = retention.waiting_jobs(connection, limit=MODELS_A_ROUND)
        if not waiting:
            return
        broker = self._app.connection_for_write()  # lazy: nothing is asked of it yet
        try:
            with broker:
                for job_id, model in waiting:
                    if stopping.is_set():
                        return
                    if not _has_message(broker, model_queue(model)):
                        self._app.send_task(DRAIN_TASK, args=[str(job_id)], queue=model_queue(model), connection=broker)
        # Redis' error answers too: one that is read-only or out of memory refuses what it is asked.
        except (OperationalError, RedisError, *broker.connection_errors, *broker.channel_errors) as error:
            if not self._is_broker_away:
                logger.warning("workers cannot be notified and find their work by polling: %s", error)
            self._is_broker_away = True
        else:
            self._is_broker_away = False


def _has_message(broker: Broker, queue: str) -> bool:
    """Whether a message lies in the queue: a model without workers must not pile them up."""
    with contextlib.suppress(ChannelError):  # no such list: nothing lies there
        return bool(broker.default_channel.queue_declare(queue=queue, passive=True).message_count)
    return False
