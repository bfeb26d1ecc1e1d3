"""How long does it take to claim 256 of 200,000 requests that wait? `python -m bench.claiming`

A Postgres of its own, with fsync, and one worker: claim, settle, claim again. Only claims are timed, from the first
statement to the answer to COMMIT. Four tenants have a job each, of lines of 1 kB; prompts begin at random, so that the
rows of one claim are spread over the whole table. That is the worst case: prompts in the order of their prefixes lie
side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine

from bench.report import save
from bench.usage import CpuTime
from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from jobs import keys
from jobs.database import connect
from jobs.ids import new_id
from jobs.queries import submission, tenants, workers
from jobs.queries.claiming import ClaimedRequest, claim
from jobs.queries.settling import Outcome, settle
from jobs.queries.workers import WorkerIdentity
from jobs.requests import JobOptions, ModelLimits, StagedLine
from jobs.settings import Settings
from jobs.states import RequestState
from migrations.run import upgrade

MODEL = ModelLimits("without-a-worker", 100_000, 100_000)
WAITING = 200_000
TENANTS = 4
LINE_BYTES = 1000
RESULT_BYTES = 500
GROUP = Settings.model_fields["stage_chunk_lines"].default
WARM_UP = 10  # claims before the first that counts: Postgres settles on its plans in the first six


def measure(claims: int, limit: int) -> dict[str, Any]:
    """Milliseconds of each claim, and the seconds of CPU that other processes used in that time."""
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory, contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(ChildLog(Path(directory) / "logs")))
        services = stack.enter_context(embedded_services(DataDir(Path(directory) / "data"), log, valkey=False))
        assert services.database_url is not None
        upgrade(services.database_url)
        database = connect(Settings(database_url=services.database_url), "pagemill bench")
        stack.callback(database.dispose)
        worker_id = _register(database)
        body = b'{"prompt":"' + b"x" * (LINE_BYTES - 13) + b'"}'
        stage_jobs(database, MODEL.name, WAITING, lambda choose: body)
        seconds = []
        before, began = CpuTime.now(os.getpid()), time.perf_counter()
        with database.connect() as connection:
            for _ in range(WARM_UP + claims):
                taken, claimed = _claim(connection, worker_id, limit)
                seconds.append(taken)
                with connection.begin():
                    settle(connection, [_answered(request) for request in claimed])
        wall = time.perf_counter() - began
        others = CpuTime.now(os.getpid()).others_since(before)
    return {
        "waiting": WAITING,
        "tenants": TENANTS,
        "line_bytes": LINE_BYTES,
        "requests_a_claim": limit,
        "claims": claims,
        "claim_ms": _milliseconds(seconds[WARM_UP:]),
        "cores_that_others_used": round(others / wall, 2),
    }


def _register(database: Engine) -> UUID:
    """A worker whose lease outlasts the measurement."""
    worker = WorkerIdentity(new_id(), "bench", 0, "none")
    with database.begin() as connection:
        workers.register(connection, worker, MODEL, lease=3600)
    return worker.id


def stage_jobs(database: Engine, model: str, lines: int, body: Callable[[random.Random], bytes]) -> None:
    """A job of each of several tenants, with `lines` in all, whose prompts begin at random; published at the end."""
    choose = random.Random(0)
    jobs = []
    for number in range(TENANTS):
        with database.begin() as connection:
            owner = tenants.ensure_tenant(connection, f"tenant {number}", keys.new_webhook_secret())
            jobs.append(submission.open_job(connection, owner.id, JobOptions(model=model)))
        for first in range(1, lines // TENANTS + 1, GROUP):
            staged = [
                StagedLine(line, f"line-{line}", choose.getrandbits(63), body(choose))
                for line in range(first, min(first + GROUP, lines // TENANTS + 1))
            ]
            with database.begin() as connection:
                submission.stage_lines(connection, jobs[-1], staged)
    with database.begin() as connection:
        for job_id in jobs:
            submission.publish(connection, job_id)


def _claim(connection: Connection, worker_id: UUID, limit: int) -> tuple[float, Sequence[ClaimedRequest]]:
    began = time.perf_counter()
    with connection.begin():
        claimed = claim(connection, worker_id, MODEL.name, limit=limit, is_idle=False, solo_after_deaths=2).requests
    seconds = time.perf_counter() - began
    if len(claimed) != limit:
        raise RuntimeError(f"{len(claimed)} requests instead of {limit}")
    return seconds, claimed


def _answered(request: ClaimedRequest) -> Outcome:
    return Outcome(
        request.token,
        RequestState.COMPLETED,
        b"x" * RESULT_BYTES,
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
    )


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "p50": round(1e3 * percentiles[49], 1),
        "p95": round(1e3 * percentiles[94], 1),
        "p99": round(1e3 * percentiles[98], 1),
        "shortest": round(1e3 * min(seconds), 1),
        "longest": round(1e3 * max(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, default=400)
    parser.add_argument("--limit", type=int, default=256, help="requests in one claim")
    options = parser.parse_args()
    save("claiming", measure(options.claims, options.limit))


if __name__ == "__main__":
    main()
