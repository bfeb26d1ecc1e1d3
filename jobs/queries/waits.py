"""How long lines wait until they are claimed, counted in logarithmic buckets by minute, model and tenant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import Connection, text

SHORTEST = 0.01  # seconds; the lower edge of bucket 0
PER_DOUBLING = 4  # buckets, so that one is 19 % wide
BUCKETS = 96  # the last one begins at 39 hours


def bucket_start(bucket: float) -> float:
    """The shortest wait of a bucket in seconds; fractions are places inside it."""
    return SHORTEST * math.exp2(bucket / PER_DOUBLING)


def percentile(buckets: Mapping[int, int], share: float) -> float | None:
    """The wait in seconds that `share` of the lines had at most, to the width of a bucket; None without lines."""
    left = share * sum(buckets.values())
    for bucket, lines in sorted(buckets.items()):
        if left <= lines:
            return bucket_start(bucket + left / lines)
        left -= lines
    return None


def note_claim(connection: Connection, worker_id: UUID, model: str, lines: Mapping[UUID, int]) -> None:
    """Count claimed lines, `{job: lines}`, by how long ago their job was published."""
    # A job's lines have waited equally long. A line that is claimed again counts again, from its job's beginning.
    connection.execute(
        text("""
            INSERT INTO wait_minutes AS w (minute, model, tenant_id, worker_id, bucket, lines)
            SELECT date_trunc('minute', clock_timestamp()), :model, j.tenant_id, :worker_id, b.bucket, sum(n.lines)
            FROM unnest(CAST(:job_ids AS uuid[]), CAST(:lines AS int[])) AS n (job_id, lines)
            JOIN jobs j ON j.id = n.job_id
            CROSS JOIN LATERAL (
                SELECT least(:last, floor(:per_doubling / ln(2.0) * ln(greatest(
                    extract(epoch FROM clock_timestamp() - j.in_progress_at)::double precision / :shortest, 1.0
                ))))::smallint AS bucket
            ) b
            GROUP BY j.tenant_id, b.bucket
            ON CONFLICT (minute, model, tenant_id, worker_id, bucket) DO UPDATE SET lines = w.lines + excluded.lines
        """),
        {
            "model": model,
            "worker_id": worker_id,
            "job_ids": list(lines),
            "lines": list(lines.values()),
            "last": BUCKETS - 1,
            "per_doubling": float(PER_DOUBLING),
            "shortest": SHORTEST,
        },
    )
