"""Files and uploads: rows here, contents in `jobs.file_store`.

    file      reserve ──content──▶ store       a row without `stored_at` is invisible, and collected when it is old
    upload    open ──parts──▶ complete         the file of an upload is reserved and stored like any other

Every function takes a tenant, but those of the courier's collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import FileInUse, FileQuotaExceeded
from jobs.ids import FILE_PREFIX, new_id, public_id
from jobs.queries import batches

UploadState = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file whose content is stored."""

    id: UUID
    purpose: str
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None
    is_stored: bool = True
    """False of a file of results while its batch runs: the content is assembled when it is read."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that comes in parts."""

    id: UUID
    state: UploadState
    purpose: str
    filename: str
    mime_type: str
    bytes: int
    file_seconds: int | None
    file_id: UUID | None
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Part:
    """A stored part of an upload."""

    id: UUID
    bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Leaving:
    """Rows whose contents are to be removed from the store before `forget`."""

    files: Sequence[UUID]
    parts: Sequence[UUID]


def reserve_file(connection: Connection, tenant_id: UUID) -> UUID:
    """A row for a file whose content is about to come in."""
    # Without `stored_at`, so that it is no file yet.
    file_id = new_id()
    connection.execute(
        text("INSERT INTO files (id, tenant_id, purpose, filename) VALUES (:id, :tenant_id, '', '')"),
        {"id": file_id, "tenant_id": tenant_id},
    )
    return file_id


def bytes_held(connection: Connection, tenant_id: UUID) -> int:
    """What a tenant's files take, parts of unfinished uploads included."""
    # Expired files count until the courier has removed them: their bytes are still there.
    size: int = connection.execute(
        text("""
            SELECT (SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant_id = :tenant_id AND deleted_at IS NULL)
                 + (SELECT coalesce(sum(p.bytes), 0)
                    FROM uploads u JOIN upload_parts p ON p.upload_id = u.id
                    WHERE u.tenant_id = :tenant_id AND u.state = 'pending')
        """),
        {"tenant_id": tenant_id},
    ).scalar_one()
    return int(size)


def store_file(
    connection: Connection,
    tenant_id: UUID,
    file_id: UUID,
    *,
    purpose: str,
    filename: str,
    size: int,
    seconds: int | None,
    quota: int,
) -> StoredFile | None:
    """Make a file visible, its content being stored. None where its reservation was collected.

    Raises `FileQuotaExceeded` where the tenant's files would take more than `quota` bytes.
    """
    # The tenant's row is locked, because two files that come at once must not both fit into the same rest of a quota.
    connection.execute(text("SELECT 1 FROM tenants WHERE id = :id FOR NO KEY UPDATE"), {"id": tenant_id})
    if bytes_held(connection, tenant_id) + size > quota:
        raise FileQuotaExceeded(quota)
    # The guard is the one that collection has, so one of the two wins.
    row = connection.execute(
        text("""
            UPDATE files SET purpose = :purpose, filename = :filename, bytes = :size, stored_at = clock_timestamp(),
                             expires_at = created_at + make_interval(secs => :seconds)
            WHERE id = :id AND tenant_id = :tenant_id AND stored_at IS NULL AND deleted_at IS NULL
            RETURNING id, purpose, filename, bytes, created_at, expires_at, stored_at IS NOT NULL AS is_stored
        """),
        {
            "id": file_id,
            "tenant_id": tenant_id,
            "purpose": purpose,
            "filename": filename,
            "size": size,
            "seconds": seconds,
        },
    ).one_or_none()
    return None if row is None else StoredFile(**row._mapping)


def get_file(connection: Connection, tenant_id: UUID, file_id: UUID) -> StoredFile | None:
    """A file as its owner sees it."""
    # Stored, or a batch's results that are read before they are stored; not deleted, and not past its time.
    row = connection.execute(
        text("""
            SELECT id, purpose, filename, bytes, created_at, expires_at, stored_at IS NOT NULL AS is_stored
            FROM files
            WHERE id = :id AND tenant_id = :tenant_id
              AND (stored_at IS NOT NULL OR batch_id IS NOT NULL) AND deleted_at IS NULL
              AND (expires_at IS NULL OR expires_at > clock_timestamp())
        """),
        {"id": file_id, "tenant_id": tenant_id},
    ).one_or_none()
    return None if row is None else StoredFile(**row._mapping)


def list_files(
    connection: Connection,
    tenant_id: UUID,
    *,
    after: UUID | None,
    limit: int,
    purpose: str | None,
    is_ascending: bool,
) -> list[StoredFile]:
    """A tenant's files from `after` on, newest first unless `is_ascending`."""
    # Ids are ordered by time, so the id is the cursor; two statements, because each direction walks the index its way.
    oldest_first = text("""
        SELECT id, purpose, filename, bytes, created_at, expires_at, stored_at IS NOT NULL AS is_stored
        FROM files
        WHERE tenant_id = :tenant_id
          AND (stored_at IS NOT NULL OR batch_id IS NOT NULL) AND deleted_at IS NULL
          AND (expires_at IS NULL OR expires_at > clock_timestamp())
          AND (CAST(:after AS uuid) IS NULL OR id > CAST(:after AS uuid))
          AND (CAST(:purpose AS text) IS NULL OR purpose = CAST(:purpose AS text))
        ORDER BY id
        LIMIT :limit
    """)
    newest_first = text("""
        SELECT id, purpose, filename, bytes, created_at, expires_at, stored_at IS NOT NULL AS is_stored
        FROM files
        WHERE tenant_id = :tenant_id
          AND (stored_at IS NOT NULL OR batch_id IS NOT NULL) AND deleted_at IS NULL
          AND (expires_at IS NULL OR expires_at > clock_timestamp())
          AND (CAST(:after AS uuid) IS NULL OR id < CAST(:after AS uuid))
          AND (CAST(:purpose AS text) IS NULL OR purpose = CAST(:purpose AS text))
        ORDER BY id DESC
        LIMIT :limit
    """)
    rows = connection.execute(
        oldest_first if is_ascending else newest_first,
        {"tenant_id": tenant_id, "after": after, "purpose": purpose, "limit": limit},
    )
    return [StoredFile(**row._mapping) for row in rows]


def delete_file(connection: Connection, tenant_id: UUID, file_id: UUID) -> bool:
    """Hide a file from now on; the courier removes its content. False where there is none.

    Raises `FileInUse` where a batch still reads it, or has not stored it yet.
    """
    # Locked, so that no batch begins to read the file after the look at those that do.
    row = connection.execute(
        text("""
            SELECT stored_at IS NULL AS is_open FROM files
            WHERE id = :id AND tenant_id = :tenant_id
              AND (stored_at IS NOT NULL OR batch_id IS NOT NULL) AND deleted_at IS NULL
              AND (expires_at IS NULL OR expires_at > clock_timestamp())
            FOR UPDATE
        """),
        {"id": file_id, "tenant_id": tenant_id},
    ).one_or_none()
    if row is None:
        return False
    if row.is_open or batches.is_reading(connection, file_id):
        raise FileInUse(public_id(FILE_PREFIX, file_id))
    # The lock holds, so it is still the file that was seen.
    connection.execute(text("UPDATE files SET deleted_at = clock_timestamp() WHERE id = :id"), {"id": file_id})
    return True


def discard_file(connection: Connection, file_id: UUID) -> None:
    """Give up a reservation; the courier removes what was stored."""
    # A file that became visible stays.
    connection.execute(
        text("UPDATE files SET deleted_at = clock_timestamp() WHERE id = :id AND stored_at IS NULL"), {"id": file_id}
    )


def open_upload(
    connection: Connection,
    tenant_id: UUID,
    *,
    purpose: str,
    filename: str,
    mime_type: str,
    size: int,
    file_seconds: int | None,
    expiry: float,
) -> Upload:
    """An upload that takes parts for `expiry` seconds."""
    # By Postgres' clock, as everything that expires.
    row = connection.execute(
        text("""
            INSERT INTO uploads (id, tenant_id, purpose, filename, mime_type, bytes, file_seconds, expires_at)
            VALUES (:id, :tenant_id, :purpose, :filename, :mime_type, :size, :file_seconds,
                    clock_timestamp() + make_interval(secs => :expiry))
            RETURNING id, state, purpose, filename, mime_type, bytes, file_seconds, file_id, created_at, expires_at
        """),
        {
            "id": new_id(),
            "tenant_id": tenant_id,
            "purpose": purpose,
            "filename": filename,
            "mime_type": mime_type,
            "size": size,
            "file_seconds": file_seconds,
            "expiry": expiry,
        },
    ).one()
    return Upload(**row._mapping)


def get_upload(connection: Connection, tenant_id: UUID, upload_id: UUID) -> Upload | None:
    """An upload as its owner sees it."""
    # One that is out of time has expired, although the courier has not said so yet.
    row = connection.execute(
        text("""
            SELECT id, CASE WHEN state = 'pending' AND expires_at <= clock_timestamp()
                            THEN 'expired' ELSE state END AS state,
                   purpose, filename, mime_type, bytes, file_seconds, file_id, created_at, expires_at
            FROM uploads
            WHERE id = :id AND tenant_id = :tenant_id
        """),
        {"id": upload_id, "tenant_id": tenant_id},
    ).one_or_none()
    return None if row is None else Upload(**row._mapping)


def reserve_part(connection: Connection, upload_id: UUID, *, most: int) -> UUID | None:
    """A row for a part whose content is about to come in. None where the upload has `most` parts.

    Empty parts, which no quota of bytes bounds, are counted as well. Calls side by side may each add one more.
    """
    # Without `stored_at`, so that it is no part yet.
    part_id = new_id()
    made = connection.execute(
        text("""
            INSERT INTO upload_parts (id, upload_id)
            SELECT :id, :upload_id
            WHERE (SELECT count(*) FROM upload_parts WHERE upload_id = :upload_id) < :most
        """),
        {"id": part_id, "upload_id": upload_id, "most": most},
    )
    return part_id if made.rowcount else None


def store_part(connection: Connection, tenant_id: UUID, part_id: UUID, *, size: int, quota: int) -> Part | None:
    """Count a part, its content being stored. None where its upload takes no parts any more.

    Raises `FileQuotaExceeded`.
    """
    # The tenant's row is locked for the quota, as in `store_file`.
    connection.execute(text("SELECT 1 FROM tenants WHERE id = :id FOR NO KEY UPDATE"), {"id": tenant_id})
    if bytes_held(connection, tenant_id) + size > quota:
        raise FileQuotaExceeded(quota)
    # Only while its upload takes parts.
    row = connection.execute(
        text("""
            UPDATE upload_parts p SET bytes = :size, stored_at = clock_timestamp()
            FROM uploads u
            WHERE p.id = :id AND u.id = p.upload_id AND u.tenant_id = :tenant_id
              AND u.state = 'pending' AND u.expires_at > clock_timestamp()
            RETURNING p.id, p.bytes, p.created_at
        """),
        {"id": part_id, "tenant_id": tenant_id, "size": size},
    ).one_or_none()
    return None if row is None else Part(**row._mapping)


def get_part(connection: Connection, upload_id: UUID, part_id: UUID) -> Part | None:
    """A part of an upload, its content being stored."""
    # By primary key; a reservation is no part.
    row = connection.execute(
        text("""
            SELECT id, bytes, created_at FROM upload_parts
            WHERE id = :id AND upload_id = :upload_id AND stored_at IS NOT NULL
        """),
        {"id": part_id, "upload_id": upload_id},
    ).one_or_none()
    return None if row is None else Part(**row._mapping)


def stored_parts(connection: Connection, upload_id: UUID) -> list[Part]:
    """The parts of an upload whose content is stored."""
    # A reservation is no part.
    rows = connection.execute(
        text("SELECT id, bytes, created_at FROM upload_parts WHERE upload_id = :upload_id AND stored_at IS NOT NULL"),
        {"upload_id": upload_id},
    )
    return [Part(**row._mapping) for row in rows]


def end_upload(connection: Connection, upload_id: UUID, state: UploadState, file_id: UUID | None = None) -> bool:
    """Complete, cancel or expire a pending upload. False where it is not pending any more."""
    # The first of two ends wins.
    return (
        connection.execute(
            text("UPDATE uploads SET state = :state, file_id = :file_id WHERE id = :id AND state = 'pending'"),
            {"id": upload_id, "state": state, "file_id": file_id},
        ).rowcount
        == 1
    )


def expire(connection: Connection, *, abandoned_after: float) -> None:
    """Hide files and end uploads whose time is over, and give up contents that stopped coming in."""
    # Files past their time, and reservations whose content stopped coming in; a batch's results are neither.
    connection.execute(
        text("""
            UPDATE files SET deleted_at = clock_timestamp()
            WHERE deleted_at IS NULL
              AND (expires_at <= clock_timestamp()
                   OR stored_at IS NULL AND batch_id IS NULL
                      AND created_at < clock_timestamp() - make_interval(secs => :abandoned_after))
        """),
        {"abandoned_after": abandoned_after},
    )
    # Uploads past their time; their parts follow.
    connection.execute(
        text("UPDATE uploads SET state = 'expired' WHERE state = 'pending' AND expires_at <= clock_timestamp()")
    )


def leaving(connection: Connection, *, limit: int) -> Leaving:
    """Files that are hidden, and parts of uploads that are not pending, at most `limit` of each."""
    # The oldest first.
    files = connection.execute(
        text("SELECT id FROM files WHERE deleted_at IS NOT NULL ORDER BY created_at LIMIT :limit"),
        {"limit": limit},
    ).scalars()
    # Of completed uploads, too: their file has a content of its own.
    parts = connection.execute(
        text("""
            SELECT p.id FROM upload_parts p JOIN uploads u ON u.id = p.upload_id
            WHERE u.state <> 'pending'
            ORDER BY p.id
            LIMIT :limit
        """),
        {"limit": limit},
    ).scalars()
    return Leaving(list(files), list(parts))


def forget(connection: Connection, gone: Leaving) -> None:
    """Remove the rows of contents that are gone."""
    connection.execute(text("DELETE FROM files WHERE id = ANY(:ids)"), {"ids": list(gone.files)})
    connection.execute(text("DELETE FROM upload_parts WHERE id = ANY(:ids)"), {"ids": list(gone.parts)})
