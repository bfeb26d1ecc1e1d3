"""OpenAI's objects of files and uploads, as they go out. Times are Unix seconds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel

from jobs.ids import BATCH_PREFIX, FILE_PREFIX, JOB_PREFIX, UPLOAD_PREFIX, public_id
from jobs.queries.batches import Batch, BatchStatus, Counts
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


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchError(BaseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(BaseModel):
    """A batch as it stood when it was asked for; `job_id` is the same work under `/v1/jobs`."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None
    usage: BatchUsage | None
    job_id: str | None

    @classmethod
    def of(cls, batch: Batch) -> BatchObject:
        job, status = batch.job, batch.status
        ended_at = None if batch.finalized_at is None else int(batch.finalized_at.timestamp())
        cancelling_at = batch.cancelling_at or (None if job is None else job.cancelling_at)
        failed = 0 if job is None else job.failed + job.cancelled + job.expired
        return cls(
            id=public_id(BATCH_PREFIX, batch.id),
            endpoint=batch.endpoint,
            model=batch.model,
            errors=None
            if batch.errors is None
            else BatchErrors(data=[BatchError.model_validate(error) for error in batch.errors]),
            input_file_id=public_id(FILE_PREFIX, batch.input_file_id),
            completion_window=batch.completion_window,
            status=status,
            output_file_id=_file_id(batch.output_file_id if job is not None and job.completed else None),
            error_file_id=_file_id(batch.error_file_id if failed else None),
            created_at=int(batch.created_at.timestamp()),
            in_progress_at=None if job is None else int(job.in_progress_at.timestamp()),
            expires_at=int(batch.expires_at.timestamp()),
            finalizing_at=_seconds(job.ended_at) if job is not None and job.state == "completed" else None,
            completed_at=ended_at if status == "completed" else None,
            failed_at=_seconds(batch.failed_at),
            expired_at=ended_at if status == "expired" else None,
            cancelling_at=_seconds(cancelling_at),
            cancelled_at=(ended_at or _seconds(batch.cancelling_at)) if status == "cancelled" else None,
            request_counts=BatchCounts(
                total=0 if job is None else job.total, completed=0 if job is None else job.completed, failed=failed
            ),
            metadata=batch.metadata,
            usage=None if job is None else _usage(job),
            job_id=None if batch.job_id is None else public_id(JOB_PREFIX, batch.job_id),
        )


def _usage(job: Counts) -> BatchUsage:
    return BatchUsage(
        input_tokens=job.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=job.cached_tokens),
        output_tokens=job.completion_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=job.prompt_tokens + job.completion_tokens,
    )


def _file_id(identity: UUID | None) -> str | None:
    return None if identity is None else public_id(FILE_PREFIX, identity)


class BatchList(BaseModel):
    """Newest first. The next page is asked for with `after` and the id of the last item."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
