"""Bodies of answers. Bodies of requests are `jobs.requests`."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from api.redis_probe import RedisState
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries.open_jobs import OpenJob
from jobs.queries.reading import Job, ServedModel
from jobs.requests import window_text
from jobs.states import JobState


class RequestCounts(BaseModel):
    """open + completed + failed + cancelled + expired = total, at every moment."""

    total: int
    open: int = Field(description="waiting or running")
    completed: int
    failed: int
    cancelled: int
    expired: int


class Usage(BaseModel):
    prompt_tokens: int
    cached_tokens: int = Field(description="of the prompt tokens, those found in the prefix cache")
    completion_tokens: int
    total_tokens: int


def job_fields(job: Job) -> dict[str, object]:
    """The fields of `JobObject`, of a published job."""
    return {
        "id": public_id(JOB_PREFIX, job.id),
        "name": job.name,
        "status": job.state,
        "model": job.model,
        "priority": job.priority,
        "metadata": job.metadata,
        "completion_window": None if job.completion_window is None else window_text(job.completion_window),
        "request_counts": {
            "total": job.total,
            "open": job.open,
            "completed": job.completed,
            "failed": job.failed,
            "cancelled": job.cancelled,
            "expired": job.expired,
        },
        "last_seq": job.last_seq,
        "usage": {
            "prompt_tokens": job.prompt_tokens,
            "cached_tokens": job.cached_tokens,
            "completion_tokens": job.completion_tokens,
            "total_tokens": job.prompt_tokens + job.completion_tokens,
        },
        "created_at": int(job.created_at.timestamp()),
        "in_progress_at": int(job.in_progress_at.timestamp()),
        "expires_at": seconds(job.expires_at),
        "cancelling_at": seconds(job.cancelling_at),
        "ended_at": seconds(job.ended_at),
        "paused_at": seconds(job.paused_at),
        "retry_of": None if job.retry_of is None else public_id(JOB_PREFIX, job.retry_of),
    }


class JobObject(BaseModel):
    """A job as it stood when it was asked for. Times are Unix seconds."""

    id: str
    object: Literal["job"] = "job"
    name: str | None = Field(description="as given, or `name` of the metadata")
    status: JobState
    model: str
    priority: int
    metadata: dict[str, str]
    completion_window: str | None = Field(description="as `24h` or `90m`")
    request_counts: RequestCounts
    last_seq: int = Field(description="`seq` of the newest result line")
    usage: Usage
    created_at: int
    in_progress_at: int | None = Field(description="null while lines may be appended")
    expires_at: int | None
    cancelling_at: int | None
    ended_at: int | None
    paused_at: int | None = Field(description="while set, no line of it is started")
    retry_of: str | None = Field(description="the job whose lines it runs again")

    @classmethod
    def of(cls, job: Job) -> JobObject:
        return cls.model_validate(job_fields(job))

    @classmethod
    def of_open(cls, job: OpenJob) -> JobObject:
        """A job that takes lines, and is given up at `expires_at` where no more come."""
        return cls(
            id=public_id(JOB_PREFIX, job.id),
            name=job.name,
            status=JobState.VALIDATING,
            model=job.model,
            priority=job.priority,
            metadata=job.metadata,
            completion_window=None if job.completion_window is None else window_text(job.completion_window),
            request_counts=RequestCounts(
                total=job.total, open=job.total, completed=0, failed=0, cancelled=0, expired=0
            ),
            last_seq=0,
            usage=Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0, total_tokens=0),
            created_at=int(job.created_at.timestamp()),
            in_progress_at=None,
            expires_at=int(job.expires_at.timestamp()),
            cancelling_at=None,
            ended_at=None,
            paused_at=None,
            retry_of=None,
        )


class JobDeleted(BaseModel):
    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


class ModelObject(BaseModel):
    """A model that some worker has served; jobs for one without a live worker wait for it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["pagemill"] = "pagemill"
    max_model_len: int = Field(description="context in tokens")
    vocab_size: int
    live_workers: int

    @classmethod
    def of(cls, model: ServedModel) -> ModelObject:
        return cls(
            id=model.name,
            created=int(model.registered_at.timestamp()),
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            live_workers=model.live_workers,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class WebhookSecret(BaseModel):
    """What this tenant's webhooks are signed with (https://www.standardwebhooks.com)."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str


class Alive(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Postgres is needed; without Redis jobs start a poll interval later."""

    status: Literal["ok", "degraded: polling"]
    postgres: Literal["ok"] = "ok"
    redis: RedisState
    notifications_sent: int
    notifications_lost: int
    bells_sent: int = Field(deprecated=True, description="`notifications_sent`, by its old name for one release")
    bells_lost: int = Field(deprecated=True, description="`notifications_lost`, by its old name for one release")


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "server_error"]
    param: str | None = Field(description="the field to blame")
    code: str | None
    line: int | None = Field(default=None, description="the line of an NDJSON body to blame, from 1")


class ErrorAnswer(BaseModel):
    """Every failure looks like this; `x-request-id` names it in the log."""

    error: ErrorDetail


def seconds(moment: datetime | None) -> int | None:
    """A moment as Unix seconds."""
    return None if moment is None else int(moment.timestamp())
