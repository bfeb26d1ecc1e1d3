"""What a claim or a group of results reads depends on its own size, not on the job's: counted in rows, not in time."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import text

from jobs.queries.claiming import claim
from jobs.queries.settling import settle
from tests.support.reads import analyze, rows_read
from tests.support.rows import MODEL, Rows, answered

TABLES = ("requests", "bodies", "results")  # that grow
LINES = 6_000
LIMIT = 64
ROUNDS = 8  # psycopg prepares a statement at its sixth use, and Postgres may then settle on another plan


# Jobs of long ago that Postgres still goes by: how many, of how many lines.
LEFT_BEHIND = {"of one line": (1, 1), "of one job": (1, 3), "of small jobs": (200, 3)}


@pytest.mark.parametrize("plans", ["auto", "force_generic_plan"])
@pytest.mark.parametrize("statistics", ["none", "of an empty table", *LEFT_BEHIND, "of a shrunken table", "fresh"])
def test_rows_read_by_claims_and_groups_are_bounded(rows: Rows, statistics: str, plans: str) -> None:
    if statistics == "of an empty table":
        analyze(rows)
    if statistics in LEFT_BEHIND:
        jobs, lines = LEFT_BEHIND[statistics]
        for _ in range(jobs):
            rows.job(lines, tenant="a")
        analyze(rows)
        rows.execute("TRUNCATE jobs CASCADE")
    if statistics == "of a shrunken table":
        # Three rows on the last of many pages.
        rows.job(LINES // 3)
        rows.clear_jobs()
        rows.job(3, tenant="a")
        analyze(rows)
    # Three tenants, and prefixes in an order of their own: what a sort of everything would have to sort.
    for tenant in "abc":
        rows.job(LINES // 3, tenant=tenant, prefixes=[line * 7919 % 1009 for line in range(LINES // 3)])
    if statistics == "fresh":
        analyze(rows)
    worker_id = rows.worker()
    with rows.database.connect() as connection:
        connection.execute(text(f"SET plan_cache_mode = {plans}"))
        connection.commit()
        for _ in range(ROUNDS):
            with connection.begin():
                before = rows_read(connection, TABLES)
                claimed = claim(
                    connection, worker_id, MODEL.name, limit=LIMIT, is_idle=False, solo_after_deaths=2
                ).requests
                assert len(claimed) == LIMIT
                _assert_bounded(rows_read(connection, TABLES) - before)
            with connection.begin():
                before = rows_read(connection, TABLES)
                assert settle(connection, [answered(request) for request in claimed]).written == LIMIT
                _assert_bounded(rows_read(connection, TABLES) - before)
    rows.check()


def _assert_bounded(read: Counter[str]) -> None:
    assert all(number <= 16 * LIMIT for number in read.values()), read
