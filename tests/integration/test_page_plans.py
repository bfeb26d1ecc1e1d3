"""What the pages read depends on what they show, not on all that was kept: counted in rows, not in time."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

from jobs import search
from jobs.queries import fleet, lines, overview, reading, retention, searching, tenant_queues, throughput
from jobs.queries.lines import Filter
from tests.support.reads import analyze, rows_read
from tests.support.rows import MODEL, Rows

# That grow.
TABLES = ("jobs", "requests", "bodies", "results", "job_minutes", "wait_minutes", "tenant_days", "tenant_failures")
KEPT = 4_000  # rows of long ago in each table that is kept by time
OPEN = 300  # jobs of a line each
SHOWN = 50
FEW = 16 * SHOWN

# A job that settled lines in many minutes, and the claims of as many, all more than a day ago.
LONG_AGO = (
    """
    INSERT INTO job_minutes SELECT :job, date_trunc('minute', now()) - interval '2 days' - make_interval(mins => n),
        1, 0, 1, 0, 1 FROM generate_series(1, :kept) n
    """,
    """
    INSERT INTO wait_minutes SELECT date_trunc('minute', now()) - interval '2 days' - make_interval(mins => n),
        :model, gen_random_uuid(), gen_random_uuid(), 0, 1 FROM generate_series(1, :kept) n
    """,
    """
    INSERT INTO tenant_days SELECT current_date - 2 - n % 28, gen_random_uuid(), gen_random_uuid(), 1, 1
    FROM generate_series(1, :kept) n
    """,
    """
    INSERT INTO tenant_failures SELECT current_date - 2 - n % 28, gen_random_uuid(), n
    FROM generate_series(1, :kept) n
    """,
    """
    INSERT INTO requests (job_id, line, state, epoch)
    SELECT :job, n, 'completed', 1 FROM generate_series(2, :kept) n
    """,
    "INSERT INTO bodies SELECT :job, n, 'line-' || n, '' FROM generate_series(2, :kept) n",
    "INSERT INTO results (job_id, seq, line, state, body) SELECT :job, n, n, 'completed', '' "
    "FROM generate_series(2, :kept) n",
    "UPDATE jobs SET total = :kept, completed = :kept, last_seq = :kept WHERE id = :job",
)

Read = Callable[[Connection, UUID, UUID], object]
READS: dict[str, Read] = {
    "overview": lambda c, tenant, job: overview.read_overview(c, tenant, limit=64, solo_after_deaths=2),
    "overview of all tenants": lambda c, tenant, job: overview.read_overview(c, None, limit=64, solo_after_deaths=2),
    "queue": lambda c, tenant, job: tenant_queues.read_queues(c, None),
    "throughput": lambda c, tenant, job: throughput.read_throughput(c, MODEL.name),
    "fleet": lambda c, tenant, job: fleet.list_workers(c),
    "open jobs": lambda c, tenant, job: searching.search_jobs(
        c, tenant, search.parse("status:open"), after=None, limit=SHOWN
    ),
    "newest results": lambda c, tenant, job: lines.read_chunk(
        c, job, Filter(), at=KEPT + 1, last_seq=KEPT, is_forward=False, limit=SHOWN
    ),
    "failed results": lambda c, tenant, job: lines.read_chunk(
        c, job, Filter("failed"), at=KEPT + 1, last_seq=KEPT, is_forward=False, limit=SHOWN
    ),
    "one line": lambda c, tenant, job: lines.read_line(c, job, KEPT // 2),
    "results in their order": lambda c, tenant, job: reading.read_results(c, job, after=KEPT // 2, limit=SHOWN),
    "forgetting": lambda c, tenant, job: retention.forget_minutes(c, retention=60 * 86_400),
}


@pytest.fixture(scope="module", params=["none", "of an empty table", "of one line", "fresh"])
def kept(request: pytest.FixtureRequest, _rows: Rows) -> tuple[Rows, UUID, UUID]:
    """Rows with much that was kept and little that is new, under statistics of that kind; their tenant, a large job."""
    rows = _rows
    rows.clear()
    if request.param == "of one line":
        rows.finish(rows.job(1))
    if request.param in ("of an empty table", "of one line"):
        analyze(rows)
    large = rows.job(1)
    tenant = rows.tenant().id
    rows.finish(large)
    with rows.database.begin() as connection:
        for statement in LONG_AGO:
            connection.execute(text(statement), {"job": large, "kept": KEPT, "model": MODEL.name})
    for _ in range(3):
        rows.job(4)
    rows.claim(rows.worker(), 2)
    if request.param == "fresh":
        analyze(rows)
    return rows, tenant, large


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_rows_read_for_a_page_are_few_among_many_that_are_kept(kept: tuple[Rows, UUID, UUID], read: Read) -> None:
    rows, tenant, large = kept
    with rows.database.connect() as connection, connection.begin() as transaction:
        before = rows_read(connection, TABLES)
        read(connection, tenant, large)
        found = rows_read(connection, TABLES) - before
        transaction.rollback()
    assert all(number <= FEW for number in found.values()), found


def test_open_jobs_cost_a_claim_no_look_at_the_requests_of_each(rows: Rows) -> None:
    for _ in range(OPEN):
        rows.job(1)
    worker_id = rows.worker()
    rows.claim(worker_id, 4)
    with rows.database.begin() as connection:
        before = rows_read(connection, TABLES)
        tenant_queues.read_queues(connection, None)
        overview.read_overview(connection, None, limit=64, solo_after_deaths=2)
        found = rows_read(connection, TABLES) - before
    assert found["requests by index"] + found["requests by scanning"] < OPEN / 4, found
