"""Records of what requests made: the same request, sent again, is answered with what it made the first time.

The record is written in the transaction that makes the object: of two equal requests one makes it, and the other,
which waits for that transaction, learns of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import IdempotencyMismatch


@dataclass(frozen=True, slots=True)
class Claim:
    """What identifies a request for `seconds`: the hash `request`, and the hash of its body.

    `replaces_older`: seconds since this request began. An older record belongs to another request with the same hash,
    and is replaced. None: a record holds until it expires.
    """

    tenant_id: UUID
    request: bytes
    body_sha256: bytes
    seconds: float
    replaces_older: float | None


class AlreadyMade(Exception):
    """An earlier try of this request made `object_id`; the transaction that made another is rolled back."""

    def __init__(self, object_id: UUID) -> None:
        super().__init__(object_id)
        self.object_id = object_id


def record(
    connection: Connection, claim: Claim | None, object_id: UUID, *, is_standing: Callable[[UUID], bool]
) -> None:
    """Note that this transaction makes `object_id` for `claim`; nothing is noted where there is none.

    Raises `AlreadyMade` where an earlier try made an object that still stands, `IdempotencyMismatch` where that try had
    another body.
    """
    if claim is None:
        return
    values = {
        "tenant_id": claim.tenant_id,
        "request": claim.request,
        "sha256": claim.body_sha256,
        "object_id": object_id,
        "seconds": claim.seconds,
        "age": claim.replaces_older,
    }
    # Waits for a transaction that writes the same record, and replaces a record that has expired.
    is_ours = connection.execute(
        text("""
            INSERT INTO creations AS c (tenant_id, request, body_sha256, object_id, expires_at)
            VALUES (:tenant_id, :request, :sha256, :object_id,
                    clock_timestamp() + make_interval(secs => :seconds))
            ON CONFLICT (tenant_id, request) DO UPDATE
            SET body_sha256 = excluded.body_sha256, object_id = excluded.object_id,
                created_at = excluded.created_at, expires_at = excluded.expires_at
            WHERE c.expires_at <= clock_timestamp()
               OR c.created_at < clock_timestamp() - make_interval(secs => :age)
            RETURNING true
        """),
        values,
    ).scalar()
    if is_ours:
        return
    # This is the record that stopped the statement above, because the conflict locked its row.
    made = connection.execute(
        text("SELECT body_sha256, object_id FROM creations WHERE tenant_id = :tenant_id AND request = :request"), values
    ).one()
    if is_standing(made.object_id):
        if made.body_sha256 != claim.body_sha256:
            raise IdempotencyMismatch
        raise AlreadyMade(made.object_id)
    # What it made is gone: the record is this request's.
    connection.execute(
        text("""
            UPDATE creations SET body_sha256 = :sha256, object_id = :object_id, created_at = clock_timestamp(),
                                 expires_at = clock_timestamp() + make_interval(secs => :seconds)
            WHERE tenant_id = :tenant_id AND request = :request
        """),
        values,
    )


def forget_expired(connection: Connection) -> int:
    """Remove records that hold no longer. Returns how many."""
    # By the index over their ends.
    return connection.execute(text("DELETE FROM creations WHERE expires_at <= clock_timestamp()")).rowcount
