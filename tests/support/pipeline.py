"""A pipeline without HTTP: jobs straight into Postgres, real worker processes, and what came out of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Engine, create_engine, text

from jobs.database import sqlalchemy_url
from jobs.queries import rescue, settling, submission, tenants
from jobs.queries.reading import Job, get_job
from jobs.requests import JobOptions, ModelLimits, Params, parse_request
from jobs.settings import Settings
from tests.support.fake_worker import MAX_MODEL_LEN, MODEL, VOCAB_SIZE
from tests.support.processes import PATIENCE, await_condition

# Clocks short enough for a test, in the proportions of the real ones.
QUICK = {
    "PAGEMILL_LEASE": "3",
    "PAGEMILL_FENCE_AFTER": "2",
    "PAGEMILL_HEARTBEAT_INTERVAL": "0.5",
    "PAGEMILL_POLL_INTERVAL": "0.2",
    "PAGEMILL_WRITE_INTERVAL": "0.05",
    "PAGEMILL_DRAIN_DEADLINE": "0.5",
}


@dataclass
class Pipeline:
    """One database and the workers on it."""

    database_url: str
    redis_url: str
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    worker_module: Sequence[str] = ("tests.support.fake_worker",)
    """With its arguments; it serves `MODEL`."""

    database: Engine = field(init=False)
    tenant: tenants.Tenant = field(init=False)

    def __post_init__(self) -> None:
        self.database = create_engine(sqlalchemy_url(self.database_url), pool_pre_ping=True)
        with self.database.begin() as connection:
            self.tenant = tenants.ensure_tenant(connection, "default", "whsec_c2VjcmV0")
            connection.execute(
                text(
                    "INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, :length, :size) "
                    "ON CONFLICT (name) DO NOTHING"
                ),
                {"name": MODEL, "length": MAX_MODEL_LEN, "size": VOCAB_SIZE},
            )

    def close(self) -> None:
        self.database.dispose()

    @property
    def settings(self) -> Settings:
        quick = {name.removeprefix("PAGEMILL_").lower(): value for name, value in QUICK.items()}
        return Settings(database_url=self.database_url, redis_url=self.redis_url, **quick)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def worker(self, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process, registered; killed at the end if it still runs."""
        known = self.live_workers()
        process = self.start_worker(**environment)
        try:
            await_condition(lambda: bool(self.live_workers() - known), "the worker's registration")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def start_worker(self, **environment: str) -> subprocess.Popen[bytes]:
        """The same, without waiting; the caller ends it."""
        with (self.directory / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *self.worker_module],
                env={
                    **os.environ,
                    **QUICK,
                    "PAGEMILL_DATABASE_URL": self.database_url,
                    "PAGEMILL_REDIS_URL": self.redis_url,
                    **self.environment,
                    **environment,
                },
                stdout=log,
                stderr=log,
            )

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        model: str = MODEL,
        bodies: Mapping[int, bytes] | None = None,
        **params: Any,
    ) -> UUID:
        """A published job, without a notification. `bodies` are stored for some lines instead of what the API would."""
        limits = ModelLimits(model, MAX_MODEL_LEN, VOCAB_SIZE)
        defaults = Params(**{"max_tokens": 20, "temperature": 0, **params})
        lines = [
            parse_request({"prompt": list(prompt)}, line, defaults, limits) for line, prompt in enumerate(prompts, 1)
        ]
        lines = [replace(line, body=(bodies or {}).get(line.line, line.body)) for line in lines]
        with self.database.begin() as connection:
            job_id = submission.open_job(connection, self.tenant.id, JobOptions(model=model))
            assert submission.stage_lines(connection, job_id, lines)
            assert submission.publish(connection, job_id)
        return job_id

    def wait_for_results(self, job_id: UUID, count: int) -> None:
        await_condition(lambda: self.job(job_id).last_seq >= count, f"{count} results")

    def job(self, job_id: UUID) -> Job:
        with self.database.begin() as connection:
            job = get_job(connection, self.tenant.id, job_id)
        assert job is not None
        return job

    def wait_for_end(self, job_id: UUID, *, timeout: float = PATIENCE) -> Job:
        await_condition(lambda: self.job(job_id).is_terminal, "the job's end", timeout)
        return self.job(job_id)

    def results(self, job_id: UUID) -> dict[int, dict[str, Any]]:
        """Line → the stored body, of a job whose results are each there once."""
        rows = self.query("SELECT seq, line, body FROM results WHERE job_id = :id ORDER BY seq", id=job_id)
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
        by_line = {row.line: orjson.loads(row.body) for row in rows}
        assert len(by_line) == len(rows)
        return by_line

    def states(self, job_id: UUID) -> dict[str, int]:
        rows = self.query("SELECT state, count(*) AS n FROM requests WHERE job_id = :id GROUP BY state", id=job_id)
        return {row.state: row.n for row in rows}

    def live_workers(self) -> set[UUID]:
        return {row.id for row in self.query("SELECT id FROM workers WHERE ended_at IS NULL")}

    def reap(self) -> settling.ReapResult | None:
        """What the courier's sweep does, now."""
        with self.database.begin() as connection:
            return rescue.reap_worker(connection, max_deaths=self.settings.max_deaths)

    def query(self, statement: str, **parameters: object) -> Sequence[Any]:
        with self.database.begin() as connection:
            return connection.execute(text(statement), parameters).all()
