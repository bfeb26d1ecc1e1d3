"""OpenAI's objects of files and uploads, as they go out. Times are Unix seconds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

from jobs.ids import FILE_PREFIX, UPLOAD_PREFIX, public_id
from jobs.queries.files import StoredFile, Upload, UploadState


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, file: StoredFile) -> FileObject:
        return cls(
            id=public_id(FILE_PREFIX, file.id),
            bytes=file.bytes,
            created_at=int(file.created_at.timestamp()),
            expires_at=_seconds(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    """The next page is asked for with `after` and the id of the last item."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadObject(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadState
    file: FileObject | None

    @classmethod
    def of(cls, upload: Upload, file: StoredFile | None = None) -> UploadObject:
        return cls(
            id=public_id(UPLOAD_PREFIX, upload.id),
            bytes=upload.bytes,
            created_at=int(upload.created_at.timestamp()),
            expires_at=int(upload.expires_at.timestamp()),
            filename=upload.filename,
            purpose=upload.purpose,
            status=upload.state,
            file=None if file is None else FileObject.of(file),
        )


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
