"""Groups of lines that failed alike, kept while lines are settled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.fingerprints import GROUPS_A_JOB, OTHER, Failure


def group(connection: Connection, failed: Collection[tuple[UUID, int, Failure]]) -> None:
    """Count lines that this transaction settles as failed; it holds the locks of their jobs already."""
    job_ids = {job_id for job_id, _, _ in failed}
    # At most GROUPS_A_JOB + 1 a job.
    known = connection.execute(
        text("SELECT job_id, fingerprint FROM failure_groups WHERE job_id = ANY(CAST(:job_ids AS uuid[]))"),
        {"job_ids": list(job_ids)},
    ).all()
    kinds: dict[UUID, set[int]] = defaultdict(set)
    for row in known:
        if row.fingerprint != OTHER:
            kinds[row.job_id].add(row.fingerprint)
    lines: dict[tuple[UUID, int], list[int]] = defaultdict(list)
    failures: dict[tuple[UUID, int], Failure] = {}
    regrouped: list[tuple[UUID, int]] = []
    for job_id, line, failure in sorted(failed, key=lambda entry: entry[:2]):
        fingerprint = failure.fingerprint
        if fingerprint not in kinds[job_id] and len(kinds[job_id]) >= GROUPS_A_JOB:
            fingerprint = OTHER
            failure = Failure("other", f"More than {GROUPS_A_JOB} kinds of failure; these lines failed in other ways.")
            regrouped.append((job_id, line))
        else:
            kinds[job_id].add(fingerprint)
        lines[job_id, fingerprint].append(line)
        failures[job_id, fingerprint] = failure
    # Insert new groups, and count these lines in those that exist.
    connection.execute(
        text("""
            INSERT INTO failure_groups AS g
                (job_id, fingerprint, code, message, lines, first_line, first_at, last_at)
            SELECT n.job_id, n.fingerprint, n.code, n.message, n.lines, n.first_line,
                   statement_timestamp(), statement_timestamp()
            FROM unnest(CAST(:job_ids AS uuid[]), CAST(:fingerprints AS bigint[]), CAST(:codes AS text[]),
                        CAST(:messages AS text[]), CAST(:lines AS int[]), CAST(:first_lines AS int[]))
                AS n (job_id, fingerprint, code, message, lines, first_line)
            ON CONFLICT (job_id, fingerprint) DO UPDATE
            SET lines = g.lines + excluded.lines, last_at = excluded.last_at
        """),
        {
            "job_ids": [job_id for job_id, _ in lines],
            "fingerprints": [fingerprint for _, fingerprint in lines],
            "codes": [failure.code for failure in failures.values()],
            "messages": [failure.template for failure in failures.values()],
            "lines": [len(numbers) for numbers in lines.values()],
            "first_lines": [numbers[0] for numbers in lines.values()],
        },
    )
    # The kinds of the day, in one order everywhere so that no two groups wait for each other.
    connection.execute(
        text("""
            INSERT INTO tenant_failures (day, tenant_id, fingerprint)
            SELECT DISTINCT (statement_timestamp() AT TIME ZONE 'UTC')::date, j.tenant_id, n.fingerprint
            FROM unnest(CAST(:job_ids AS uuid[]), CAST(:fingerprints AS bigint[])) AS n (job_id, fingerprint)
            JOIN jobs j ON j.id = n.job_id
            WHERE NOT j.is_live
            ORDER BY j.tenant_id, n.fingerprint
            ON CONFLICT DO NOTHING
        """),
        {"job_ids": [job_id for job_id, _ in lines], "fingerprints": [fingerprint for _, fingerprint in lines]},
    )
    if regrouped:
        # Few jobs have so many kinds; their further lines are found under the one group that counts them.
        connection.execute(
            text("""
                UPDATE results r SET fingerprint = :other
                FROM unnest(CAST(:job_ids AS uuid[]), CAST(:lines AS int[])) AS n (job_id, line)
                WHERE r.job_id = n.job_id AND r.line = n.line
            """),
            {"other": OTHER, "job_ids": [job for job, _ in regrouped], "lines": [line for _, line in regrouped]},
        )
