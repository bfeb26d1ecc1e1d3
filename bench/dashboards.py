"""What do open dashboards cost the API, and how long do their pages take it? `python -m bench.dashboards`

A Postgres of its own holds 10,000 jobs that ended within a day, one of a million lines that runs, and 40 small ones
that run. The API is a process of its own. First each page's requests are timed, then streams are opened as pages open
them, and the API's seconds of CPU are counted while 40 jobs settle a line each second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import Engine, text

from bench.report import save
from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from cli.first_key import store_key
from jobs import keys
from jobs.database import connect
from jobs.ids import new_id, public_id
from jobs.queries import submission, tenants, workers
from jobs.queries.claiming import ClaimedRequest, claim
from jobs.queries.settling import Outcome, settle
from jobs.queries.workers import WorkerIdentity
from jobs.requests import JobOptions, ModelLimits, StagedLine
from jobs.settings import Settings
from jobs.states import RequestState
from migrations.run import upgrade

MODEL = ModelLimits("demo", 100_000, 100_000)
ENDED = 10_000
MOVING = 40
LINES_OF_MOVING = 2_000
LOOKS = 30  # at each page

# Jobs of one line each, with their minutes, a tenth of them failed; ids are ordered by time, as UUIDv7 are.
END_JOBS = """
    WITH made AS (
        INSERT INTO jobs (id, tenant_id, state, model, name, metadata, total, completed, failed, last_seq,
                          prompt_tokens, completion_tokens, created_at, in_progress_at, ended_at)
        SELECT CAST(lpad(to_hex(CAST(extract(epoch FROM at) * 1000 AS bigint)), 12, '0') || '70008'
                    || lpad(to_hex(n), 15, '0') AS uuid),
               :tenant_id, 'completed', :model, 'job ' || n, jsonb_build_object('team', 'team ' || n % 50), 1,
               CAST(n % 10 > 0 AS int), CAST(n % 10 = 0 AS int), 1, 10, 20, at, at, at
        FROM (SELECT n, clock_timestamp() - make_interval(secs => (:count - n + 1) * 8) AS at
              FROM generate_series(1, :count) n) g
        RETURNING id, created_at, failed
    ), minutes AS (
        INSERT INTO job_minutes SELECT id, date_trunc('minute', created_at), 1, failed, 10, 0, 20 FROM made
    )
    INSERT INTO failure_groups SELECT id, 1, 'invalid_grammar', 'the grammar', 1, 1, created_at, created_at
    FROM made WHERE failed > 0
"""
# What a job of many lines has once half of them were settled, 600 minutes of them.
HALF_DONE = (
    """
    INSERT INTO requests (job_id, line, state, epoch)
    SELECT :id, n, CASE WHEN n <= :half THEN 'completed' ELSE 'pending' END, CAST(n <= :half AS int)
    FROM generate_series(1, 2 * :half) n
    """,
    """
    INSERT INTO bodies
    SELECT :id, n, 'line-' || n, convert_to(json_build_object('prompt', CAST(n AS text))::text, 'UTF8')
    FROM generate_series(1, 2 * :half) n
    """,
    """
    INSERT INTO results (job_id, seq, line, state, body, settled_at)
    SELECT :id, n, n, 'completed', convert_to(json_build_object('response', json_build_object('body', json_build_object(
               'choices', json_build_array(json_build_object('text', CAST(n AS text))), 'usage', json_build_object()
           )), 'error', NULL)::text, 'UTF8'), clock_timestamp()
    FROM generate_series(1, :half) n
    """,
    """
    INSERT INTO job_minutes
    SELECT :id, date_trunc('minute', clock_timestamp()) - make_interval(mins => n), :half / 600, 0, 1, 0, 1
    FROM generate_series(1, 600) n
    """,
    """
    UPDATE jobs
    SET total = 2 * :half, completed = :half, last_seq = :half, state = 'in_progress', staged_at = clock_timestamp(),
        in_progress_at = clock_timestamp() - interval '11 hours'
    WHERE id = :id
    """,
)


def measure(streams: Sequence[int], seconds: float, lines: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory, contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(ChildLog(Path(directory) / "logs")))
        services = stack.enter_context(embedded_services(DataDir(Path(directory) / "data"), log, valkey=False))
        assert services.database_url is not None
        upgrade(services.database_url)
        settings = Settings(database_url=services.database_url, data_dir=Path(directory) / "data")
        key = keys.new_key()
        store_key(settings, services.database_url, key, tenant="default", name="bench")
        database = connect(settings, "pagemill bench")
        stack.callback(database.dispose)
        large, moving = _fill(database, lines)
        url, pid = stack.enter_context(_api(settings))
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=url, headers=headers, timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None)
        ) as client:
            pages = _pages(client, large)
            stack.enter_context(_settling(database))
            shares = {count: _share(client, pid, count, moving, seconds) for count in streams}
        return {
            "jobs": ENDED,
            "lines_of_the_large_job": lines,
            "pages_ms": pages,
            "jobs_that_change_each_second": MOVING,
            "cpu_of_the_api_by_open_dashboards": shares,
        }


def _fill(database: Engine, lines: int) -> tuple[str, list[str]]:
    """The ids of the large job and of those that move."""
    with database.begin() as connection:
        workers.register(connection, WorkerIdentity(new_id(), "bench", 0, "none"), MODEL, lease=3600)
        owner = tenants.ensure_tenant(connection, "default", keys.new_webhook_secret())
        connection.execute(text(END_JOBS), {"tenant_id": owner.id, "model": MODEL.name, "count": ENDED})
        large = submission.open_job(connection, owner.id, JobOptions(model=MODEL.name, name="large", priority=-100))
        for statement in HALF_DONE:
            connection.execute(text(statement), {"id": large, "half": lines // 2})
    moving = []
    for number in range(MOVING):
        staged = [StagedLine(line, str(line), 0, b'{"prompt":"1"}') for line in range(1, LINES_OF_MOVING + 1)]
        with database.begin() as connection:
            job_id = submission.open_job(connection, owner.id, JobOptions(model=MODEL.name, name=f"moving {number}"))
            submission.stage_lines(connection, job_id, staged)
            submission.publish(connection, job_id)
        moving.append(public_id("job_", job_id))
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return public_id("job_", large), moving


@contextlib.contextmanager
def _api(settings: Settings) -> Iterator[tuple[str, int]]:
    """The URL and the process of an API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PAGEMILL_DATABASE_URL": str(settings.database_url),
        "PAGEMILL_REDIS_URL": "redis://127.0.0.1:9",
        "PAGEMILL_DATA_DIR": str(settings.data_dir),
        "PAGEMILL_PORT": str(port),
        "PAGEMILL_LOG_LEVEL": "warning",
    }
    process = subprocess.Popen([sys.executable, "-m", "cli", "api"], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/healthz", trust_env=False).is_success:
                    break
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def _pages(client: httpx.Client, large: str) -> dict[str, dict[str, float]]:
    """Milliseconds of each page's requests, one after the other; of the second and later looks."""
    parts = "progress,failures,timeline,deliveries,results"
    pages = {
        "jobs": ["/v1/overview", "/v1/jobs?limit=100", "/v1/jobs?limit=100&q=status:open", "/v1/jobs/counts"],
        "jobs, searched": [
            '/v1/jobs?limit=100&q=failed:>0 metadata.team:"team 10" name:job -status:open',
            '/v1/jobs/counts?q=failed:>0 metadata.team:"team 10" name:job -status:open',
        ],
        "suggestions": ["/v1/suggest?field=metadata.team&prefix=team"],
        "job of many lines": ["/v1/overview", f"/v1/jobs/{large}?include={parts}"],
        "queue": ["/v1/overview", "/v1/queue"],
        "fleet": ["/v1/overview", "/v1/workers"],
    }
    found = {}
    for name, paths in pages.items():
        took = []
        for _ in range(LOOKS + 1):
            began = time.perf_counter()
            for path in paths:
                client.get(path).raise_for_status()
            took.append(1e3 * (time.perf_counter() - began))
        found[name] = {"p50": round(statistics.median(took[1:]), 1), "longest": round(max(took[1:]), 1)}
    return found


@contextlib.contextmanager
def _settling(database: Engine) -> Iterator[None]:
    """Settle one line of each moving job a second, from a thread."""
    is_over = threading.Event()

    def run() -> None:
        with database.connect() as connection:
            with connection.begin():
                worker_id = connection.execute(text("SELECT id FROM workers")).scalar_one()
            held: dict[Any, list[ClaimedRequest]] = {}
            while not is_over.wait(1.0):
                if not all(len(held.get(job, ())) for job in held) or len(held) < MOVING:
                    with connection.begin():
                        taken = claim(connection, worker_id, MODEL.name, limit=4000, is_idle=True, solo_after_deaths=2)
                    for request in taken.requests:
                        held.setdefault(request.token.job_id, []).append(request)
                outcomes = [_answered(requests.pop()) for requests in held.values() if requests]
                with connection.begin():
                    settle(connection, outcomes)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _answered(request: ClaimedRequest) -> Outcome:
    return Outcome(request.token, RequestState.COMPLETED, b"{}", prompt_tokens=1, cached_tokens=0, completion_tokens=1)


def _share(client: httpx.Client, pid: int, count: int, moving: Sequence[str], seconds: float) -> dict[str, float]:
    """The API's share of a core while so many streams are read, and what they bring."""
    query = {"topics": "overview", "jobs": ",".join(moving), "newest": "job_" + "f" * 32}
    got = [0, 0]
    is_over = threading.Event()

    def read(responses: Sequence[httpx.Response]) -> None:
        sockets = [response.extensions["network_stream"].get_extra_info("socket") for response in responses]
        for connection in sockets:
            connection.settimeout(0.2)
        while not is_over.is_set():
            time.sleep(0.2)
            for connection in sockets:
                with contextlib.suppress(TimeoutError, BlockingIOError):
                    connection.setblocking(False)
                    while data := connection.recv(1 << 20):
                        got[0] += len(data)
                        got[1] += data.count(b"event: job\n")

    with contextlib.ExitStack() as stack:
        responses = [stack.enter_context(client.stream("GET", "/v1/events", params=query)) for _ in range(count)]
        reader = threading.Thread(target=read, args=(responses,))
        reader.start()
        time.sleep(5)
        process = psutil.Process(pid)
        before, began, bytes_before, events_before = process.cpu_times(), time.perf_counter(), *got
        time.sleep(seconds)
        after, wall = process.cpu_times(), time.perf_counter() - began
        is_over.set()
        reader.join()
    used = after.user + after.system - before.user - before.system
    return {
        "percent_of_a_core": round(100 * used / wall, 2),
        "kilobytes_a_second_each": round((got[0] - bytes_before) / wall / 1e3 / max(1, count), 1),
        "rows_a_second_each": round((got[1] - events_before) / wall / max(1, count), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=json.loads, default=[0, 1, 100], help="a JSON list")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the large job")
    options = parser.parse_args()
    save("dashboards", measure(options.streams, options.seconds, options.lines))


if __name__ == "__main__":
    main()
