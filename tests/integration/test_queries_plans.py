"""What a claim or a group of results reads depends on its own size, not on the job's: counted in rows, not in time."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import Connection, text

from jobs.queries.claiming import claim
from jobs.queries.settling import settle
from tests.rows import MODEL, Rows, answered

LINES = 20_000
LIMIT = 64
ROUNDS = 8  # psycopg prepares a statement at its sixth use, and Postgres may then settle on another plan


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of small jobs", "fresh"])
def test_no_claim_and_no_group_looks_at_the_whole_job(rows: Rows, statistics: str) -> None:
    if statistics == "of an empty table":
        _analyze(rows)
    if statistics == "of small jobs":
        # What earlier jobs left behind, long after they are gone.
        for _ in range(200):
            rows.job(3, tenant="a")
        _analyze(rows)
        rows.execute("TRUNCATE jobs CASCADE")
    # Three tenants, and prefixes in an order of their own: what a sort of everything would have to sort.
    for tenant in "abc":
        rows.job(LINES // 3, tenant=tenant, prefixes=[line * 7919 % 1009 for line in range(LINES // 3)])
    if statistics == "fresh":
        _analyze(rows)
    worker_id = rows.worker()
    with rows.database.connect() as connection:
        for _ in range(ROUNDS):
            with connection.begin():
                before = _read(connection)
                claimed = claim(
                    connection, worker_id, MODEL.name, limit=LIMIT, is_idle=False, solo_after_deaths=2
                ).requests
                assert len(claimed) == LIMIT
                _assert_bounded(_read(connection) - before)
            with connection.begin():
                before = _read(connection)
                assert settle(connection, [answered(request) for request in claimed]).written == LIMIT
                _assert_bounded(_read(connection) - before)
    rows.check()


def _analyze(rows: Rows) -> None:
    with rows.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _read(connection: Connection) -> Counter[str]:
    """Rows that this connection has read of the tables that grow, by how it came to them."""
    found = connection.execute(
        text(
            "SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables "
            "WHERE relname IN ('requests', 'bodies', 'results')"
        )
    )
    counts: Counter[str] = Counter()
    for row in found:
        counts[f"{row.relname} by scanning"] = row.seq_tup_read
        counts[f"{row.relname} by index"] = row.idx_tup_fetch or 0
    return counts


def _assert_bounded(read: Counter[str]) -> None:
    assert all(number <= 16 * LIMIT for number in read.values()), read
