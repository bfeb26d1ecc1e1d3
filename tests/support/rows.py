"""Real rows for tests, made by the same queries that the service uses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

from sqlalchemy import Engine, Row, text

from jobs.database import connect
from jobs.ids import new_id
from jobs.keys import new_webhook_secret
from jobs.queries import submission, tenants, workers
from jobs.queries.claiming import Claim, ClaimedRequest, claim
from jobs.queries.rescue import reap_worker
from jobs.queries.settling import Outcome, Settled, cancel_job, jobs_to_settle, settle, settle_open
from jobs.queries.tenants import Tenant
from jobs.queries.workers import WorkerIdentity
from jobs.requests import JobOptions, ModelLimits, StagedLine, Webhook
from jobs.settings import Settings
from jobs.states import JobState, RequestState
from jobs.tables import metadata
from tests.support import oracle
from tests.support.processes import await_condition

MODEL = ModelLimits("demo", max_model_len=128, vocab_size=100)
ANSWER = b'{"response":{"status_code":200},"error":null}'


class Rows:
    """Makes tenants, jobs and workers, and acts as a worker does. Each method is a transaction of its own."""

    def __init__(self, database_url: str, database: Engine) -> None:
        self.database_url = database_url
        self.database = database

    def clear(self) -> None:
        """Leave nothing but a model that is known."""
        with self.database.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
            connection.execute(
                text("INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, 128, 100)"),
                {"name": MODEL.name},
            )

    def clear_jobs(self) -> None:
        """Leave tenants, keys and models as they are."""
        with self.database.begin() as connection:
            # Quicker than TRUNCATE where rows are few.
            for table in ("jobs", "requests", "bodies", "results", "line_events", "tenant_days", "tenant_failures"):
                connection.execute(text(f"DELETE FROM {table}"))

    def check(self) -> None:
        """Hold the rows against the oracle."""
        with self.database.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            oracle.assert_rules(connection)

    def tenant(self, name: str = "default") -> Tenant:
        with self.database.begin() as connection:
            return tenants.ensure_tenant(connection, name, new_webhook_secret())

    def job(
        self,
        lines: int = 3,
        *,
        tenant: str = "default",
        priority: int = 0,
        window: str | None = None,
        webhook: str | None = None,
        prefixes: Sequence[int] | None = None,
        published: bool = True,
    ) -> UUID:
        """A job of so many lines; `prefixes` gives the prefix of each."""
        owner = self.tenant(tenant).id
        head = JobOptions(
            model=MODEL.name,
            priority=priority,
            completion_window=window,
            webhook=None if webhook is None else Webhook(url=webhook),
            metadata={"made": "for a test"},
        )
        with self.database.begin() as connection:
            job_id = submission.open_job(connection, owner, head)
            staged = [
                StagedLine(line, f"request-{line}", prefixes[line - 1] if prefixes else 0, b'{"prompt":"1+1="}')
                for line in range(1, lines + 1)
            ]
            assert submission.stage_lines(connection, job_id, staged)
            if published:
                assert submission.publish(connection, job_id)
        return job_id

    def worker(self, *, lease: float = 60.0) -> UUID:
        worker = WorkerIdentity(new_id(), host="test", pid=os.getpid(), device="cpu")
        with self.database.begin() as connection:
            workers.register(connection, worker, MODEL, lease=lease)
        return worker.id

    def lapse(self, worker_id: UUID) -> None:
        """Let a worker's lease be over, as if it had been silent for long."""
        self.execute(
            "UPDATE workers SET lease_expires_at = clock_timestamp() - interval '1 second' WHERE id = :id", id=worker_id
        )

    def claim(self, worker_id: UUID, limit: int = 100, *, is_idle: bool = True, solo_after_deaths: int = 2) -> Claim:
        with self.database.begin() as connection:
            return claim(
                connection, worker_id, MODEL.name, limit=limit, is_idle=is_idle, solo_after_deaths=solo_after_deaths
            )

    def settle(self, claimed: Sequence[ClaimedRequest], state: RequestState = RequestState.COMPLETED) -> Settled:
        with self.database.begin() as connection:
            return settle(connection, [answered(request, state) for request in claimed])

    def settle_due(self) -> None:
        """End what is cancelled or out of time, as the courier does."""
        with self.database.begin() as connection:
            for job_id in jobs_to_settle(connection, limit=100):
                settle_open(connection, job_id, limit=1000)

    def cancel(self, job_id: UUID, *, tenant: str = "default") -> JobState | None:
        tenant_id = self.tenant(tenant).id
        with self.database.begin() as connection:
            return cancel_job(connection, tenant_id, job_id)

    def reap(self) -> tuple[UUID, int, int] | None:
        """Release one worker whose lease is over: its id, how many requests were freed and given up."""
        with self.database.begin() as connection:
            reaped = reap_worker(connection, max_deaths=3)
        return None if reaped is None else (reaped.worker_id, reaped.freed, reaped.given_up)

    def await_blocked(self) -> None:
        """Wait until some connection to this database waits for a lock."""
        await_condition(lambda: self.count_blocked() > 0, "a statement that waits for a lock")

    def count_blocked(self) -> int:
        """Connections to this database that wait for a lock."""
        rows = self.query(
            "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(str(rows[0].n))

    def finish(self, job_id: UUID) -> None:
        """Complete a job by one worker."""
        worker_id = self.worker()
        while claimed := self.claim(worker_id).requests:
            self.settle(claimed)
        assert self.job_row(job_id).state == "completed"

    def job_row(self, job_id: UUID) -> Row[tuple[object, ...]]:
        return self.query("SELECT * FROM jobs WHERE id = :id", id=job_id)[0]

    def states(self, job_id: UUID) -> list[str]:
        """The state of each request, in the order of lines."""
        rows = self.query("SELECT state FROM requests WHERE job_id = :id ORDER BY line", id=job_id)
        return [row.state for row in rows]

    def query(self, statement: str, **parameters: object) -> Sequence[Row[tuple[object, ...]]]:
        with self.database.connect() as connection:
            return connection.execute(text(statement), parameters).all()

    def execute(self, statement: str, **parameters: object) -> int:
        with self.database.begin() as connection:
            return connection.execute(text(statement), parameters).rowcount


def answered(request: ClaimedRequest, state: RequestState = RequestState.COMPLETED) -> Outcome:
    """A worker's answer to a request that it claimed."""
    return Outcome(
        request.token,
        state,
        ANSWER,
        prompt_tokens=4,
        cached_tokens=1,
        completion_tokens=2,
    )


@contextmanager
def rows_in(database_url: str) -> Iterator[Rows]:
    """Rows over a pool that is closed afterwards."""
    database = connect(Settings(database_url=database_url, database_pool_size=24), "pagemill tests")
    try:
        yield Rows(database_url, database)
    finally:
        database.dispose()
