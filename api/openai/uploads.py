"""`/v1/uploads`: a file in parts, which come in any order and side by side."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from sqlalchemy import Connection

from api.deps import Caller, InjectedServices, Services
from api.openai.documents import json_body, read_document
from api.openai.files import FORM_OVERHEAD, MAX_SECONDS, MIN_SECONDS, PURPOSES, checked_purpose, cut_filename
from api.openai.multipart import read_form
from api.openai.objects import UploadObject, UploadPart
from api.openai.repeats import RequestAttempt
from api.openai.storing import storing
from api.request_body import read_body
from jobs.errors import FileQuotaExceeded, InvalidInput, SubmissionCollected, UploadClosed, UploadMissing
from jobs.file_store import file_name, part_name
from jobs.ids import PART_PREFIX, UPLOAD_PREFIX, parse_id, public_id
from jobs.queries import creations, files
from jobs.queries.creations import AlreadyMade
from jobs.queries.files import Part, StoredFile, Upload
from jobs.queries.tenants import Tenant
from jobs.strict_model import FewComplaints

router = APIRouter(prefix="/v1/uploads", tags=["files"])

MAX_PARTS = 10_000


class _Body(FewComplaints):
    model_config = ConfigDict(extra="forbid", strict=True)


class ExpiresAfter(_Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]


class CreateUpload(_Body):
    bytes: Annotated[int, Field(ge=0)]
    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: Annotated[str, Field(json_schema_extra={"enum": list(PURPOSES)})]
    expires_after: ExpiresAfter | None = None


class CompleteUpload(_Body):
    part_ids: Annotated[list[str], Field(max_length=MAX_PARTS, fail_fast=True)]
    md5: str | None = None


def _upload_body() -> dict[str, Any]:
    body = json_body(CreateUpload)
    schema = body["requestBody"]["content"]["application/json"]["schema"]
    schema["properties"]["expires_after"] = {"anyOf": [ExpiresAfter.model_json_schema(), {"type": "null"}]}
    return body


_PART_FORM = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}
PART_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _PART_FORM}}}}


@router.post("", openapi_extra=_upload_body())
async def create_upload(
    request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> UploadObject:
    """Announce a file that will come in parts."""
    settings = services.settings
    asked, sha256 = await read_document(services, request, CreateUpload)
    if asked.bytes > settings.max_file_bytes:
        raise InvalidInput(f"a file has at most {settings.max_file_bytes} bytes", param="bytes")
    purpose = checked_purpose(asked.purpose)
    if await services.transaction(files.bytes_held, caller.id) + asked.bytes > settings.max_tenant_file_bytes:
        raise FileQuotaExceeded(settings.max_tenant_file_bytes)

    def make(connection: Connection) -> Upload:
        upload = files.open_upload(
            connection,
            caller.id,
            purpose=purpose,
            filename=cut_filename(asked.filename),
            mime_type=cut_filename(asked.mime_type),
            size=asked.bytes,
            file_seconds=None if asked.expires_after is None else asked.expires_after.seconds,
            expiry=settings.upload_expiry,
        )
        creations.record(
            connection,
            attempt.claim(sha256),
            upload.id,
            is_standing=lambda made: files.get_upload(connection, caller.id, made) is not None,
        )
        return upload

    try:
        return UploadObject.of(await services.transaction(make))
    except AlreadyMade as earlier:
        upload = await _find(services, caller, public_id(UPLOAD_PREFIX, earlier.object_id))
        return UploadObject.of(upload, await _file_of(services, caller, upload))


@router.post("/{upload_id}/parts", openapi_extra=PART_BODY)
async def add_part(
    upload_id: str, request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> UploadPart:
    """Store a part: the form's file field `data`."""
    settings = services.settings
    upload = await _find(services, caller, upload_id)
    _require_pending(upload)
    part_id = await services.transaction(files.reserve_part, upload.id, most=MAX_PARTS)
    if part_id is None:
        raise InvalidInput(f"an upload has at most {MAX_PARTS} parts", param="data")
    pieces = read_body(request, max_bytes=settings.max_part_bytes + FORM_OVERHEAD, timeout=settings.body_timeout)
    async with storing():
        form = await read_form(
            request,
            pieces,
            file_field="data",
            opened=services.files.writing(part_name(part_id)),
            max_bytes=settings.max_part_bytes,
        )

    def make(connection: Connection) -> Part:
        creations.record(
            connection,
            attempt.claim(form.fingerprint),
            part_id,
            is_standing=lambda made: files.get_part(connection, upload.id, made) is not None,
        )
        part = files.store_part(
            connection, caller.id, part_id, size=form.size or 0, quota=settings.max_tenant_file_bytes
        )
        if part is None:
            raise UploadClosed(upload_id, "complete, cancelled or expired by now")
        return part

    try:
        part = await services.transaction(make)
    except AlreadyMade as earlier:
        await _drop(services, part_id)
        found = await services.transaction(files.get_part, upload.id, earlier.object_id)
        if found is None:
            raise UploadMissing(upload_id) from None
        part = found
    except UploadClosed:
        await _drop(services, part_id)
        raise
    return UploadPart(
        id=public_id(PART_PREFIX, part.id), created_at=int(part.created_at.timestamp()), upload_id=upload_id
    )


async def _drop(services: Services, part_id: UUID) -> None:
    async with storing():
        await services.files.delete(part_name(part_id))


@router.post("/{upload_id}/complete", openapi_extra=json_body(CompleteUpload))
async def complete_upload(upload_id: str, request: Request, caller: Caller, services: InjectedServices) -> UploadObject:
    """Put the parts together, in the order of `part_ids`. A repeated call answers with what the first one made."""
    settings = services.settings
    asked, _ = await read_document(services, request, CompleteUpload)
    upload = await _find(services, caller, upload_id)
    if upload.state != "completed":
        _require_pending(upload)
        parts = _in_order(asked.part_ids, await services.transaction(files.stored_parts, upload.id))
        if sum(part.bytes for part in parts) != upload.bytes:
            total = sum(part.bytes for part in parts)
            raise InvalidInput(f"the parts have {total} bytes, {upload.bytes} were announced", param="part_ids")
        file_id = await services.transaction(files.reserve_file, caller.id)
        try:
            async with storing():
                await _join(services, file_id, parts, asked.md5)
            await services.transaction(_complete, caller.id, upload, file_id, settings.max_tenant_file_bytes)
        except BaseException:  # cancelled, too
            await asyncio.shield(services.quietly(files.discard_file, file_id))
            raise
        upload = await _find(services, caller, upload_id)
    return UploadObject.of(upload, await _file_of(services, caller, upload))


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: str, caller: Caller, services: InjectedServices) -> UploadObject:
    """Take no more parts, and drop those that came."""
    upload = await _find(services, caller, upload_id)
    if not await services.transaction(files.end_upload, upload.id, "cancelled") and upload.state != "cancelled":
        raise UploadClosed(upload_id, (await _find(services, caller, upload_id)).state)
    return UploadObject.of(await _find(services, caller, upload_id))


async def _find(services: Services, caller: Tenant, upload_id: str) -> Upload:
    identity = parse_id(UPLOAD_PREFIX, upload_id)
    upload = None if identity is None else await services.transaction(files.get_upload, caller.id, identity)
    if upload is None:
        raise UploadMissing(upload_id[:100])
    return upload


def _require_pending(upload: Upload) -> None:
    if upload.state != "pending":
        raise UploadClosed(public_id(UPLOAD_PREFIX, upload.id), upload.state)


def _in_order(part_ids: Sequence[str], stored: Sequence[Part]) -> list[Part]:
    known = {part.id: part for part in stored}
    parts = []
    for place, text in enumerate(part_ids):
        part = known.pop(parse_id(PART_PREFIX, text) or UUID(int=0), None)
        if part is None:
            raise InvalidInput("not a part of this upload, or named twice", param=f"part_ids[{place}]")
        parts.append(part)
    return parts


async def _join(services: Services, file_id: UUID, parts: Sequence[Part], md5: str | None) -> None:
    checksum = hashlib.md5(usedforsecurity=False)
    async with services.files.writing(file_name(file_id)) as writer:
        for part in parts:
            async for piece in services.files.read(part_name(part.id), 0, part.bytes):
                checksum.update(piece)
                await writer.write(piece)
        if md5 is not None and checksum.hexdigest() != md5.lower():
            raise InvalidInput(f"the parts have the sum {checksum.hexdigest()}", param="md5")


def _complete(connection: Connection, tenant_id: UUID, upload: Upload, file_id: UUID, quota: int) -> None:
    if not files.end_upload(connection, upload.id, "completed", file_id):
        raise UploadClosed(public_id(UPLOAD_PREFIX, upload.id), "complete, cancelled or expired by now")
    # After the upload's end, because its parts count until then.
    stored = files.store_file(
        connection,
        tenant_id,
        file_id,
        purpose=upload.purpose,
        filename=upload.filename,
        size=upload.bytes,
        seconds=upload.file_seconds,
        quota=quota,
    )
    if stored is None:
        raise SubmissionCollected


async def _file_of(services: Services, caller: Tenant, upload: Upload) -> StoredFile | None:
    if upload.file_id is None:
        return None
    return await services.transaction(files.get_file, caller.id, upload.file_id)
