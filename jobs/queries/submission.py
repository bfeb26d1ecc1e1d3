"""Submission of a job: reserve its key, stage its lines, publish it with one guarded UPDATE, or abandon it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import DuplicateCustomId
from jobs.ids import new_id
from jobs.queries.copy import copy_rows
from jobs.queries.planner import force_index_scans
from jobs.requests import MAX_JOB_NAME, JobOptions, ModelLimits, StagedLine, Webhook, window_seconds
from jobs.tracing import submitting_trace


@dataclass(frozen=True, slots=True)
class Reservation:
    """The job of an Idempotency-Key. `body_sha256` is None while the request that reserved it still uploads.

    `is_orphaned`: the upload is not finished, and no session holds its lock.
    """

    job_id: UUID
    body_sha256: bytes | None
    is_ours: bool
    is_orphaned: bool = False


def find_model(connection: Connection, name: str) -> ModelLimits | None:
    """A model that some worker has registered, alive or not."""
    # Models keep their rows after their workers end.
    row = connection.execute(
        text("SELECT name, max_model_len, vocab_size FROM models WHERE name = :name"), {"name": name}
    ).one_or_none()
    return None if row is None else ModelLimits(row.name, row.max_model_len, row.vocab_size)


def upload_lock(job_id: UUID) -> int:
    """The advisory lock that is held, exclusively and by a session, while an upload with a key into `job_id` lives.

    The random half of the id; its variant bits make it negative, and every other lock of ours has a positive key.
    """
    return int.from_bytes(job_id.bytes[8:], "big", signed=True)


def open_job(
    connection: Connection,
    tenant_id: UUID,
    head: JobOptions,
    job_id: UUID | None = None,
    *,
    is_live: bool = False,
    retry_of: UUID | None = None,
) -> UUID:
    """Insert a job in `validating`, invisible until it is published. `job_id`: an id that was reserved before."""
    job_id = job_id or new_id()
    window = None if head.completion_window is None else window_seconds(head.completion_window)
    # Counters start at 0; `total` grows with each staged group.
    connection.execute(
        text("""
            INSERT INTO jobs (id, tenant_id, state, model, priority, metadata, name, webhook_endpoint_id,
                              webhook_events, completion_window, is_live, retry_of,
                              traceparent)
            VALUES (:id, :tenant_id, 'validating', :model, :priority, CAST(:metadata AS jsonb), :name, :endpoint_id,
                    CAST(:events AS text[]), :completion_window, :is_live, :retry_of,
                    :traceparent)
        """),
        {
            "id": job_id,
            "tenant_id": tenant_id,
            "model": head.model,
            "priority": head.priority,
            "metadata": json.dumps(head.metadata),
            "name": head.name if head.name is not None else head.metadata.get("name", "")[:MAX_JOB_NAME] or None,
            "endpoint_id": None if head.webhook is None else _endpoint(connection, tenant_id, head.webhook),
            "events": None if head.webhook is None else head.webhook.events,
            "completion_window": window,
            "is_live": is_live,
            "retry_of": retry_of,
            "traceparent": submitting_trace(),
        },
    )
    return job_id


def _endpoint(connection: Connection, tenant_id: UUID, webhook: Webhook) -> UUID:
    """The tenant's endpoint of that URL, enabled."""
    # One row for each tenant and URL, so that deliveries of all its jobs share a limit; naming it anew enables it.
    endpoint_id: UUID = connection.execute(
        text("""
            INSERT INTO webhook_endpoints (id, tenant_id, url) VALUES (:id, :tenant_id, :url)
            ON CONFLICT (tenant_id, url) WHERE event_types IS NULL DO UPDATE SET disabled_at = NULL
            RETURNING id
        """),
        {"id": new_id(), "tenant_id": tenant_id, "url": webhook.url},
    ).scalar_one()
    return endpoint_id


def reserve(connection: Connection, tenant_id: UUID, key: str, job_id: UUID) -> Reservation:
    """Tie an Idempotency-Key to `job_id`, or learn which job has it. A deleted job's key is free."""
    # Free the key of a deleted job.
    connection.execute(
        text("""
            DELETE FROM idempotency_keys k USING jobs j
            WHERE k.tenant_id = :tenant_id AND k.key = :key AND j.id = k.job_id AND j.deleted_at IS NOT NULL
        """),
        {"tenant_id": tenant_id, "key": key},
    )
    # The first to insert owns the key until the job is published or abandoned.
    inserted = connection.execute(
        text("""
            INSERT INTO idempotency_keys (tenant_id, key, job_id) VALUES (:tenant_id, :key, :job_id)
            ON CONFLICT (tenant_id, key) DO NOTHING
            RETURNING job_id
        """),
        {"tenant_id": tenant_id, "key": key, "job_id": job_id},
    ).scalar()
    if inserted is not None:
        return Reservation(job_id, None, is_ours=True)
    existing = find_reservation(connection, tenant_id, key)
    # It may have been abandoned between the two statements; then it is free again.
    return existing if existing is not None else reserve(connection, tenant_id, key, job_id)


def find_reservation(connection: Connection, tenant_id: UUID, key: str) -> Reservation | None:
    """The job that holds this tenant's Idempotency-Key."""
    # Keys are the tenant's own.
    row = connection.execute(
        text("SELECT job_id, body_sha256 FROM idempotency_keys WHERE tenant_id = :tenant_id AND key = :key"),
        {"tenant_id": tenant_id, "key": key},
    ).one_or_none()
    if row is None:
        return None
    is_orphaned = False
    if row.body_sha256 is None:
        # Shared, so that two transactions that look at once do not see each other; kept until this one ends.
        is_orphaned = connection.execute(
            text("SELECT pg_try_advisory_xact_lock_shared(:lock)"), {"lock": upload_lock(row.job_id)}
        ).scalar_one()
    return Reservation(row.job_id, row.body_sha256, is_ours=False, is_orphaned=is_orphaned)


def free_orphaned(connection: Connection, tenant_id: UUID, key: str) -> None:
    """Abandon the job of an Idempotency-Key if its upload is dead. An upload that still lives stores nothing more."""
    # While this transaction has the upload's lock, the upload cannot take it again.
    reservation = find_reservation(connection, tenant_id, key)
    if reservation is not None and reservation.is_orphaned:
        abandon(connection, reservation.job_id)


def stage_lines(connection: Connection, job_id: UUID, lines: Sequence[StagedLine]) -> bool:
    """Store a group of lines. False if the job was collected.

    Raises `DuplicateCustomId` with the line to blame, before anything of the group is stored.
    """
    # Looked for first: a COPY that breaks the constraint would write the custom_id into Postgres' log.
    _refuse_duplicates(connection, job_id, lines)
    # Update the job before its lines: an upload that was given up stops here, and the courier sees that this one lives.
    staged = connection.execute(
        text("""
            UPDATE jobs SET total = total + :count, staged_at = clock_timestamp()
            WHERE id = :job_id AND state = 'validating' AND deleted_at IS NULL
        """),
        {"job_id": job_id, "count": len(lines)},
    )
    if staged.rowcount == 0:
        return False
    copy_rows(
        connection,
        "requests",
        {"job_id": "uuid", "line": "int4", "prefix": "int8"},
        ((job_id, line.line, line.prefix) for line in lines),
    )
    copy_rows(
        connection,
        "bodies",
        {"job_id": "uuid", "line": "int4", "custom_id": "text", "body": "bytea"},
        ((job_id, line.line, line.custom_id, line.body) for line in lines),
    )
    return True


def _refuse_duplicates(connection: Connection, job_id: UUID, lines: Sequence[StagedLine]) -> None:
    """Raise `DuplicateCustomId` for the first line whose custom_id an earlier line has."""
    force_index_scans(connection)
    # Which of the group's ids are stored already: one look into the unique index for each, because only that index
    # gives the order (decision 0010).
    taken = set(
        connection.execute(
            text("""
                SELECT stored.custom_id
                FROM unnest(CAST(:ids AS text[])) AS n (custom_id) CROSS JOIN LATERAL (
                    SELECT b.custom_id FROM bodies b
                    WHERE b.job_id = :job_id AND b.custom_id BETWEEN n.custom_id AND n.custom_id
                    ORDER BY b.custom_id
                    LIMIT 1
                ) stored
            """),
            {"job_id": job_id, "ids": [line.custom_id for line in lines]},
        ).scalars()
    )
    for line in lines:
        if line.custom_id in taken:
            raise DuplicateCustomId(
                f"{line.custom_id!r} stands on an earlier line too", param="custom_id", line=line.line
            )
        taken.add(line.custom_id)


def publish(connection: Connection, job_id: UUID, *, body_sha256: bytes | None = None) -> bool:
    """Make a staged job visible and claimable. False if it was collected.

    `body_sha256` is given if the job holds an Idempotency-Key.
    """
    # One guarded UPDATE: the completion window starts here.
    published = connection.execute(
        text("""
            UPDATE jobs SET state = 'in_progress',
                            open_params = NULL,
                            in_progress_at = clock_timestamp(),
                            expires_at = clock_timestamp() + make_interval(secs => completion_window)
            WHERE id = :job_id AND state = 'validating' AND deleted_at IS NULL AND total > 0
        """),
        {"job_id": job_id},
    )
    if published.rowcount == 0:
        return False
    if body_sha256 is not None:
        # Requests that wait on this key learn the outcome in the same instant.
        connection.execute(
            text("UPDATE idempotency_keys SET body_sha256 = :sha256 WHERE job_id = :job_id"),
            {"sha256": body_sha256, "job_id": job_id},
        )
    return True


def abandon(connection: Connection, job_id: UUID) -> None:
    """Give up a staged job: its key is free at once, its rows are removed by the courier.

    A job that was published after all keeps its key, because a commit can succeed and its reply be lost.
    """
    # Hide the job and free its key.
    connection.execute(
        text("""
            WITH abandoned AS (
                UPDATE jobs SET deleted_at = clock_timestamp()
                WHERE id = :job_id AND state = 'validating' AND deleted_at IS NULL
                RETURNING id
            )
            DELETE FROM idempotency_keys k USING abandoned a WHERE k.job_id = a.id
        """),
        {"job_id": job_id},
    )
