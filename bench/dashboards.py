"""What do open dashboards cost the API, and how long do their pages take it? `python -m bench.dashboards`

A Postgres of its own holds 10,000 jobs that ended within a day, 1,000 that wait, one of a million lines that runs, and
50 small ones that run, as many as a page shows. The API is a process of its own. First each page's requests are timed,
and the CPU that API and Postgres take for them is counted. Then streams are opened as pages open them, and the API's
CPU is counted while each of the 50 jobs settles a line each second.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import Connection, Engine, text

from bench.publish import write_section
from bench.report import save
from bench.usage import cpu_seconds, family
from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from cli.first_key import store_key
from jobs import keys
from jobs.database import connect, connect_unpooled
from jobs.ids import new_id, public_id
from jobs.queries import submission, tenants, workers
from jobs.queries.settling import ClaimToken, Outcome, settle
from jobs.queries.workers import WorkerIdentity
from jobs.requests import JobOptions, ModelLimits, StagedLine
from jobs.settings import Settings
from jobs.states import RequestState
from migrations.run import upgrade

MODEL = ModelLimits("demo", 100_000, 100_000)
ENDED = 10_000
LINES = 1_000_000  # of the large job
WAITING = 1_000
MOVING = 50
LINES_OF_MOVING = 600  # which settle one a second
RUNNING = 4  # lines of each of them
LOOKS = 30  # at each page
PAGE_AIM_MS = 300
SHARE_AIM = 5.0  # percent of a core

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
# Jobs of a line each that no worker has come to.
WAIT_JOBS = """
    WITH made AS (
        INSERT INTO jobs (id, tenant_id, state, model, name, priority, total, created_at, in_progress_at)
        SELECT CAST(lpad(to_hex(CAST(extract(epoch FROM at) * 1000 AS bigint)), 12, '0') || '70009'
                    || lpad(to_hex(n), 15, '0') AS uuid),
               :tenant_id, 'in_progress', :model, 'waiting ' || n, -50, 1, at, at
        FROM (SELECT n, clock_timestamp() - make_interval(secs => (:count - n + 1) * 8) AS at
              FROM generate_series(1, :count) n) g
        RETURNING id
    ), lines AS (
        INSERT INTO requests (job_id, line) SELECT id, 1 FROM made
    )
    INSERT INTO bodies SELECT id, 1, '1', '{"prompt":"1"}' FROM made
"""
# The last lines of the jobs that move run.
RUN_LINES = """
    UPDATE requests r SET state = 'running', worker_id = :worker_id, epoch = 1, claimed_at = clock_timestamp()
    FROM jobs j
    WHERE j.id = r.job_id AND j.name LIKE 'moving %' AND r.line > :pending
    RETURNING j.id
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
    with (
        tempfile.TemporaryDirectory(prefix="pagemill-bench-", ignore_cleanup_errors=True) as directory,
        contextlib.ExitStack() as stack,
    ):
        log = stack.enter_context(contextlib.closing(ChildLog(Path(directory) / "logs")))
        services = stack.enter_context(embedded_services(DataDir(Path(directory) / "data"), log, valkey=False))
        assert services.database_url is not None
        upgrade(services.database_url)
        settings = Settings(database_url=services.database_url, data_dir=Path(directory) / "data")
        key = keys.new_key()
        store_key(settings, services.database_url, key, tenant="default", name="bench")
        database = connect(settings, "pagemill bench")
        stack.callback(database.dispose)
        with contextlib.closing(connect_unpooled(services.database_url, "pagemill bench").connect()) as connection:
            large, moving = _fill(connection, lines)
        url, pid = stack.enter_context(_api(settings))
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=url, headers=headers, timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None)
        ) as client:
            postgres = services.supervisor.pids()["postgres"]
            pages = _pages(client, large, {"api": pid, "postgres": postgres})
            stack.enter_context(_settling(database))
            shares = {count: _share(client, pid, count, moving, seconds) for count in streams}
        return {
            "jobs": ENDED,
            "jobs_that_wait": WAITING,
            "lines_of_the_large_job": lines,
            "pages": pages,
            "jobs_that_change_each_second": MOVING,
            "cpu_of_the_api_by_open_dashboards": shares,
        }


def _fill(connection: Connection, lines: int) -> tuple[str, list[str]]:
    """The ids of the large job and of those that move. Over a connection that waits for a million rows."""
    with connection.begin():
        workers.register(connection, WorkerIdentity(new_id(), "bench", 0, "none"), MODEL, lease=3600)
        owner = tenants.ensure_tenant(connection, "default", keys.new_webhook_secret())
        for statement, count in ((END_JOBS, ENDED), (WAIT_JOBS, WAITING)):
            connection.execute(text(statement), {"tenant_id": owner.id, "model": MODEL.name, "count": count})
        large = submission.open_job(connection, owner.id, JobOptions(model=MODEL.name, name="large", priority=-100))
        for statement in HALF_DONE:
            connection.execute(text(statement), {"id": large, "half": lines // 2})
    moving = []
    for number in range(MOVING):
        staged = [StagedLine(line, str(line), 0, b'{"prompt":"1"}') for line in range(1, LINES_OF_MOVING + 1)]
        with connection.begin():
            job_id = submission.open_job(connection, owner.id, JobOptions(model=MODEL.name, name=f"moving {number}"))
            submission.stage_lines(connection, job_id, staged)
            submission.publish(connection, job_id)
        moving.append(public_id("job_", job_id))
    with connection.begin():
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


def _pages(client: httpx.Client, large: str, pids: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Milliseconds of each page's requests, one after the other, and of the CPU of each process for a look at it."""
    parts = "progress,failures,timeline,deliveries,results"
    listed = "/v1/jobs?limit=100"
    results = f"/v1/jobs/{large}/results?preview=200&limit=50&before=1000000000"
    pages = {
        "jobs": ["/v1/overview", listed, f"{listed}&q=status:open", "/v1/jobs/counts"],
        **{
            f"jobs, {q}": [f"{listed}&q={q}", f"/v1/jobs/counts?q={q}"]
            for q in (
                "status:waiting",
                "failed:>0",
                "deadline:risk",
                "-status:open",
                "code:invalid_grammar",
                "lines:>10k",
                "nothing like it",
                'failed:>0 metadata.team:"team 10" name:job -status:open',
            )
        },
        "suggestions": [f"/v1/suggest?field={field}" for field in ("status", "name", "code", "metadata.team")],
        "job of many lines": ["/v1/overview", f"/v1/jobs/{large}?include={parts}"],
        "its results": [results, f"{results}&state=failed", f"{results}&state=completed"],
        "one line of it": [f"/v1/jobs/{large}", f"/v1/jobs/{large}/lines/1000"],
        "queue": ["/v1/overview", "/v1/queue"],
        "fleet": ["/v1/overview", "/v1/workers"],
    }
    found = {}
    for name, paths in pages.items():
        took = []
        for look in range(LOOKS + 1):
            if look == 1:
                before = _cpu(pids)
            began = time.perf_counter()
            for path in paths:
                client.get(path).raise_for_status()
            took.append(1e3 * (time.perf_counter() - began))
        found[name] = {
            "p50": round(statistics.median(took[1:]), 1),
            "longest": round(max(took[1:]), 1),
            **{
                f"{process}_cpu": round(1e3 * (seconds - before[process]) / LOOKS, 1)
                for process, seconds in _cpu(pids).items()
            },
        }
    return found


def _cpu(pids: Mapping[str, int]) -> dict[str, float]:
    return {name: sum(map(cpu_seconds, family(pid))) for name, pid in pids.items()}


@contextlib.contextmanager
def _settling(database: Engine) -> Iterator[None]:
    """Settle one line of each moving job a second, from a thread."""
    is_over = threading.Event()
    with database.begin() as connection:
        worker_id = connection.execute(text("SELECT id FROM workers")).scalar_one()
        moving = connection.execute(
            text(RUN_LINES), {"worker_id": worker_id, "pending": LINES_OF_MOVING - RUNNING}
        ).scalars()
        job_ids = set(moving)

    def run() -> None:
        with database.connect() as connection:
            for line in range(1, LINES_OF_MOVING - RUNNING):
                if is_over.wait(1.0):
                    return
                with connection.begin():
                    settle(connection, [_answered(ClaimToken(job_id, line, 0, None)) for job_id in job_ids])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _answered(token: ClaimToken) -> Outcome:
    return Outcome(token, RequestState.COMPLETED, b"{}", prompt_tokens=1, cached_tokens=0, completion_tokens=1)


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


def section(record: Mapping[str, Any]) -> str:
    """What docs/benchmarks.md says of a result, between its markers."""
    found, measured = record["found"], record["measured"]
    pages = [
        "| page | CPU of API + Postgres, ms | median, ms | longest, ms | aim, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {page['api_cpu']:g} + {page['postgres_cpu']:g} | {page['p50']:g} | {page['longest']:g} "
            f"| {PAGE_AIM_MS} |"
            for name, page in found["pages"].items()
        ),
    ]
    streams = [
        "| open dashboards | the API's share of a core | rows a second, each | kB a second, each | aim |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {count} | {share['percent_of_a_core']:g} % | {share['rows_a_second_each']:g} "
            f"| {share['kilobytes_a_second_each']:g} | < {SHARE_AIM:g} % |"
            for count, share in found["cpu_of_the_api_by_open_dashboards"].items()
        ),
    ]
    return "\n".join(
        [
            f"`python -m bench.dashboards` · {measured['at'][:10]} · commit {measured['commit']} · {measured['cpu']}, "
            f"{measured['cores']} threads, load {measured['load_1_min']:g} at the end · "
            f"{found['lines_of_the_large_job']:,} lines in the large job",
            "",
            *pages,
            "",
            *streams,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=json.loads, default=[0, 1, 100], help="a JSON list")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--lines", type=int, default=LINES, help="of the large job")
    options = parser.parse_args()
    record = save("dashboards", measure(options.streams, options.seconds, options.lines))
    if options.lines == LINES:
        write_section("dashboards", section(record))


if __name__ == "__main__":
    main()
