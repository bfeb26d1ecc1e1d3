"""`/v1/files`: create, list, retrieve, read, delete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.middleware.gzip import GZipResponder
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.deps import Caller, InjectedServices, Services
from api.openai.batch_runner import result_pages
from api.openai.multipart import Form, read_form
from api.openai.objects import FileDeleted, FileList, FileObject
from api.openai.repeats import RequestAttempt
from api.openai.storing import storing
from api.request_body import read_body
from jobs.errors import FileMissing, InvalidInput, SubmissionCollected
from jobs.file_store import file_name
from jobs.ids import FILE_PREFIX, parse_id, public_id
from jobs.queries import batches, creations, files
from jobs.queries.creations import AlreadyMade
from jobs.queries.files import StoredFile
from jobs.queries.tenants import Tenant

router = APIRouter(prefix="/v1/files", tags=["files"])

FORM_OVERHEAD = 1024 * 1024  # bytes of a form beside its file
PURPOSES = ("batch", "user_data", "evals", "assistants", "fine-tune", "vision")
MAX_FILENAME_BYTES = 512
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000
GZIP_LEVEL = 1  # text shrinks by four fifths at a tenth of the time that level 9 takes
_SINGLE_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class FilesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(default=None, description="id of the last file that you have")
    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


FORM_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=FORM_SCHEMA)
async def create_file(
    request: Request, caller: Caller, services: InjectedServices, attempt: RequestAttempt
) -> FileObject:
    """Store a file. Fields may come before or after the file's part; nothing of it is held in memory."""
    settings = services.settings
    pieces = read_body(request, max_bytes=settings.max_file_bytes + FORM_OVERHEAD, timeout=settings.body_timeout)
    file_id = await services.transaction(files.reserve_file, caller.id)
    try:
        async with storing():
            opened = services.files.writing(file_name(file_id))
            form = await read_form(request, pieces, file_field="file", opened=opened, max_bytes=settings.max_file_bytes)
        purpose, seconds = _form_fields(form)

        def make(connection: Connection) -> StoredFile:
            creations.record(
                connection,
                attempt.claim(form.fingerprint),
                file_id,
                is_standing=lambda made: files.get_file(connection, caller.id, made) is not None,
            )
            file = files.store_file(
                connection,
                caller.id,
                file_id,
                purpose=purpose,
                filename=cut_filename(form.filename),
                size=form.size or 0,
                seconds=seconds,
                quota=settings.max_tenant_file_bytes,
            )
            if file is None:
                raise SubmissionCollected
            return file

        return FileObject.of(await services.transaction(make))
    except AlreadyMade as earlier:
        await services.quietly(files.discard_file, file_id)
        return FileObject.of(await find_file(services, caller, public_id(FILE_PREFIX, earlier.object_id)))
    except BaseException:  # cancelled, too
        await asyncio.shield(services.quietly(files.discard_file, file_id))
        raise


def _form_fields(form: Form) -> tuple[str, int | None]:
    """Purpose, and the seconds that the file lives."""
    purpose = checked_purpose(form.fields.get("purpose"))
    given = form.fields.get("expires_after[seconds]")
    anchor = form.fields.get("expires_after[anchor]")
    if given is None and anchor is None:
        return purpose, None
    if anchor not in (None, "created_at"):
        raise InvalidInput("only 'created_at' is known", param="expires_after.anchor")
    if given is None or not re.fullmatch(r"\d{1,9}", given):
        raise InvalidInput("a whole number of seconds is expected", param="expires_after.seconds")
    return purpose, checked_seconds(int(given))


def checked_purpose(purpose: str | None) -> str:
    """One of the known purposes. Raises `InvalidInput`."""
    if purpose not in PURPOSES:
        known = ", ".join(PURPOSES)
        raise InvalidInput(f"one of {known} is expected", param="purpose")
    return purpose


def checked_seconds(seconds: int, param: str = "expires_after.seconds") -> int:
    """How long a file may be told to live. Raises `InvalidInput`."""
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InvalidInput(f"{MIN_SECONDS} to {MAX_SECONDS} seconds are allowed", param=param)
    return seconds


def cut_filename(name: str) -> str:
    """A name without control characters, at most `MAX_FILENAME_BYTES` long in UTF-8."""
    printable = "".join(c for c in name if c.isprintable() and not 0xD800 <= ord(c) < 0xE000)
    return printable.encode()[:MAX_FILENAME_BYTES].decode(errors="ignore") or "upload"


@router.get("")
async def list_files(caller: Caller, services: InjectedServices, query: Annotated[FilesQuery, Query()]) -> FileList:
    """Your files, newest first."""
    after = None
    if query.after is not None and (after := parse_id(FILE_PREFIX, query.after)) is None:
        raise InvalidInput("not a file's id", param="after")
    found = await services.transaction(
        files.list_files,
        caller.id,
        after=after,
        limit=query.limit + 1,
        purpose=query.purpose,
        is_ascending=query.order == "asc",
    )
    page = [FileObject.of(file) for file in found[: query.limit]]
    return FileList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


@router.get("/{file_id}")
async def retrieve_file(file_id: str, caller: Caller, services: InjectedServices) -> FileObject:
    """A file, without its content."""
    return FileObject.of(await find_file(services, caller, file_id))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes as they were sent."}},
)
async def read_content(file_id: str, request: Request, caller: Caller, services: InjectedServices) -> Response:
    """The same bytes; a part of them with `Range`, packed where `Accept-Encoding` has gzip."""
    file = await find_file(services, caller, file_id)
    if not file.is_stored:
        return await _results_so_far(services, file)
    start, end = _wanted(request.headers, file.bytes)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{public_id(FILE_PREFIX, file.id)}"',
    }
    if start >= end and file.bytes > 0:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{file.bytes}"})
    pieces = services.files.read(file_name(file.id), start, end)
    async with storing():
        # The first piece comes before the status: a store that fails by now still makes a proper answer.
        first = await anext(pieces, b"")

    async def content() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    is_part = end - start < file.bytes
    if is_part:
        headers |= {"content-range": f"bytes {start}-{end - 1}/{file.bytes}"}
    headers["content-length"] = str(end - start)
    answer = StreamingResponse(
        content(), 206 if is_part else 200, headers=headers, media_type="application/octet-stream"
    )
    is_packed = not is_part and "gzip" in request.headers.get("accept-encoding", "")
    return _Packed(answer) if is_packed else answer


async def _results_so_far(services: Services, file: StoredFile) -> Response:
    """A file of results while its batch runs: the lines that there are, without a length."""
    batch = await services.transaction(batches.of_file, file.id)
    if batch is None:
        raise FileMissing(public_id(FILE_PREFIX, file.id))
    pages = result_pages(services, batch, is_output=file.id == batch.output_file_id)
    # The first page comes before the status: a database that fails by now still makes a proper answer.
    first = await anext(pages, b"")

    async def content() -> AsyncIterator[bytes]:
        yield first
        async for page in pages:
            yield page

    return StreamingResponse(content(), media_type="application/octet-stream")


class _Packed(Response):
    """An answer in gzip."""

    def __init__(self, answer: StreamingResponse) -> None:
        del answer.headers["content-length"]
        self._answer = answer
        self.background = None
        self.status_code = answer.status_code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await GZipResponder(self._answer, minimum_size=0, compresslevel=GZIP_LEVEL)(scope, receive, send)


@router.delete("/{file_id}")
async def delete_file(file_id: str, caller: Caller, services: InjectedServices) -> FileDeleted:
    """Forget a file. One that a running batch reads is kept."""
    file = await find_file(services, caller, file_id)
    if not await services.transaction(files.delete_file, caller.id, file.id):
        raise FileMissing(file_id)
    return FileDeleted(id=file_id)


async def find_file(services: Services, caller: Tenant, file_id: str) -> StoredFile:
    """The caller's file. Raises `FileMissing`."""
    identity = parse_id(FILE_PREFIX, file_id)
    file = None if identity is None else await services.transaction(files.get_file, caller.id, identity)
    if file is None:
        raise FileMissing(file_id[:100])
    return file


def _wanted(headers: Mapping[str, str], size: int) -> tuple[int, int]:
    """Which bytes a request asks for, the end left out: all of them unless `Range` names one part (RFC 9110, 14.1)."""
    found = _SINGLE_RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if found is None or found[0] == "bytes=-":
        return 0, size
    first, last = found[1], found[2]
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return 0, size
    return int(first), min(size, int(last) + 1) if last else size
