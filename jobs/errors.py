"""Everything that can go wrong with a job, as one tree. `api/errors.py` is the only map from here to HTTP."""

from __future__ import annotations

# PagemillError
# ├── InvalidInput              the caller's document is wrong; names the field, and the line in a file
# │   ├── InvalidJson           not the JSON that we accept: syntax, duplicate keys, NaN, lone surrogates, depth
# │   ├── UnsupportedContent    a part of a message that is no text
# │   ├── DuplicateCustomId     two lines of a job share a custom_id
# │   └── TooLarge              over a limit of bytes, lines or depth
# ├── ModelNotFound             no worker ever served a model of that name
# ├── JobNotFound               no such job for this tenant
# ├── BatchMissing              no such batch for this tenant
# ├── BatchEnded                a batch at its end is not cancelled
# ├── MessageBatchMissing       no such message batch for this tenant
# ├── MessageBatchNotEnded      its results are not read yet
# ├── FileMissing               no such file for this tenant
# ├── FileInUse                 a batch that is not at its end reads the file
# ├── FileQuotaExceeded         the tenant's files would take more than they may
# ├── UploadMissing             no such upload for this tenant
# ├── UploadClosed              the upload is complete, cancelled or expired
# ├── WebhookEndpointMissing    no such webhook endpoint for this tenant
# ├── WebhookDeliveryMissing    no such delivery for this tenant, or its endpoint is disabled
# ├── StorageFailed             the store of files' contents is away or refuses
# │   └── StorageFull           its disk is full
# ├── JobNotDeletable           a job that still runs is cancelled first
# ├── BulkCountChanged          an action on many jobs would touch others than were shown
# ├── JobNotOpen                the job is being cancelled, or at its end
# │   └── JobTakesNoLines       it was finalized
# ├── TooManyOpenJobs           the tenant has as many jobs open as it may
# ├── IdempotencyMismatch       the key was used with another body
# ├── IdempotencyBusy           the first request with this key is still coming in
# ├── SubmissionCollected       an upload stored nothing for too long and was given up
# ├── InvalidKey                no such API key, or it is revoked or expired
# ├── RoleTooNarrow             the key's role does not reach so far
# ├── ForeignPage               a write with a session's cookie that does not come from our own page
# ├── TooManyWrongKeys          an address tries one key after the other
# ├── KeyNotFound               no such key for this tenant
# ├── WorkerNotFound            no such worker
# ├── WorkerEnded               nothing can be asked of a worker that has ended
# └── LeaseLost                 this worker's lease is gone: its later results may not be written


class PagemillError(Exception):
    """Root of the tree. `str(error)` is a sentence that the caller may read."""

    code = "internal_error"


class InvalidInput(PagemillError):
    """The caller's document is wrong.

    `param` is the path of the offending field ("prompts[3].top_p"), `line` the 1-based line of an NDJSON body. Both are
    part of the sentence that `str` gives, so `message` itself names neither.
    """

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.line = line

    def __str__(self) -> str:
        sentence = self.message if self.param is None else f"{self.param}: {self.message}"
        return sentence if self.line is None else f"Line {self.line}: {sentence}"


class InvalidJson(InvalidInput):
    """The bytes are not the JSON that we accept."""

    code = "invalid_json"


class UnsupportedContent(InvalidInput):
    """A part of a message that is no text."""

    code = "unsupported_content"


class DuplicateCustomId(InvalidInput):
    """Two lines of a job share a custom_id."""

    code = "duplicate_custom_id"


class TooLarge(InvalidInput):
    """Over a limit of bytes, lines or depth."""

    code = "request_too_large"


class ModelNotFound(PagemillError):
    """No worker ever registered a model of that name."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model!r} does not exist. GET /v1/models lists those that do.")


class JobNotFound(PagemillError):
    """No such job, or another tenant's."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id!r}.")


class BulkCountChanged(PagemillError):
    """More or fewer jobs match than were shown to the one who decided."""

    code = "bulk_count_changed"

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(f"{expected} jobs were expected, and {found} match now: look again before you decide.")


class JobNotDeletable(PagemillError):
    """A job that still runs is cancelled first."""

    code = "job_not_terminal"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"The job {job_id} is {state}; cancel it first, then delete it.")


class IdempotencyMismatch(PagemillError):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used before with a different request.")


class IdempotencyBusy(PagemillError):
    """The first request with this Idempotency-Key is still coming in."""

    code = "idempotency_key_in_use"

    def __init__(self) -> None:
        super().__init__("A request with this Idempotency-Key is still being received. Try again in a moment.")


class SubmissionCollected(PagemillError):
    """An upload was given up, since it stored nothing for too long or was taken for dead; nothing of it is kept."""

    code = "upload_timed_out"

    def __init__(self) -> None:
        super().__init__("The upload stored nothing for too long or seemed dead, and was given up. Send it again.")


class InvalidKey(PagemillError):
    """No such API key, or it is revoked or expired."""

    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "The API key is missing, wrong, revoked or expired. Send it as 'Authorization: Bearer pm_...'."
        )


class RoleTooNarrow(PagemillError):
    """The key's role does not reach so far."""

    code = "role_too_narrow"

    def __init__(self, role: str, needed: str) -> None:
        super().__init__(f"This key's role is {role}; {needed}.")


class ForeignPage(PagemillError):
    """A write with a session's cookie that does not come from our own page."""

    code = "foreign_page"

    def __init__(self) -> None:
        super().__init__(
            "A session changes things only from its own page: with Sec-Fetch-Site: same-origin (or a matching Origin) "
            "and X-Pagemill-Page: 1. A script sends its key instead, as Authorization: Bearer."
        )


class TooManyWrongKeys(PagemillError):
    """An address tries one key after the other."""

    code = "too_many_wrong_keys"

    def __init__(self) -> None:
        super().__init__("Too many wrong keys came from this address. Try again in a minute.")


class KeyNotFound(PagemillError):
    """No such key for this tenant."""

    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key {key_id!r}.")


class WorkerNotFound(PagemillError):
    """No such worker."""

    code = "worker_not_found"

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"There is no worker {worker_id!r}.")


class WorkerEnded(PagemillError):
    """Nothing can be asked of a worker that has ended."""

    code = "worker_ended"

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"The worker {worker_id!r} has ended.")


class LeaseLost(PagemillError):
    """The worker's row is gone or marked dead: its requests were released."""

    code = "lease_lost"


class JobNotOpen(PagemillError):
    """The job is being cancelled, or at its end."""

    code = "job_not_open"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"The job {job_id} is {status}; only one that is in_progress can be changed so.")


class JobTakesNoLines(JobNotOpen):
    """The job was finalized, or never took lines one request after the other."""

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(job_id, status)
        self.args = (f"The job {job_id} is {status}: it takes no more lines.",)


class TooManyOpenJobs(PagemillError):
    """The tenant has as many jobs open as it may."""

    code = "too_many_open_jobs"

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} of your jobs are open already. Finalize or delete one of them.")


class NothingToRetry(PagemillError):
    """No line of the job is as the retry wants it."""

    code = "nothing_to_retry"

    def __init__(self) -> None:
        super().__init__("No line of this job ended in that way. Nothing was made.")


class PromptsGone(PagemillError):
    """The job was deleted, by its owner or by its age, while its lines were being copied."""

    code = "prompts_gone"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"The prompts of the job {job_id} are gone: it was deleted, or its retention is over.")


class LineNotFound(PagemillError):
    """A job has no line of that number."""

    code = "line_not_found"

    def __init__(self, job_id: str, line: int) -> None:
        super().__init__(f"The job {job_id} has no line {line}.")


class BatchMissing(PagemillError):
    """No such batch, or another tenant's."""

    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"There is no batch {batch_id!r}.")


class MessageBatchMissing(PagemillError):
    """No such message batch, or another tenant's."""

    code = "message_batch_not_found"

    def __init__(self, message_batch_id: str) -> None:
        super().__init__(f"There is no message batch {message_batch_id!r}.")


class MessageBatchNotEnded(PagemillError):
    """The message batch has no results before its end."""

    code = "message_batch_not_ended"

    def __init__(self, message_batch_id: str) -> None:
        super().__init__(f"The message batch {message_batch_id} has not ended: there are no results yet.")


class BatchEnded(PagemillError):
    """A batch at its end is not cancelled."""

    code = "batch_ended"

    def __init__(self, batch_id: str, status: str) -> None:
        super().__init__(f"The batch {batch_id} is {status}.")


class FileMissing(PagemillError):
    """No such file, or another tenant's."""

    code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file {file_id!r}.")


class FileInUse(PagemillError):
    """A batch that is not at its end reads the file."""

    code = "file_in_use"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"The file {file_id} is read by a batch that is not at its end; cancel the batch first.")


class FileQuotaExceeded(PagemillError):
    """The tenant's files would take more than they may."""

    code = "file_quota_exceeded"

    def __init__(self, limit: int) -> None:
        super().__init__(f"Your files would take more than {limit} bytes. Delete some, or let them expire.")


class UploadMissing(PagemillError):
    """No such upload, or another tenant's."""

    code = "upload_not_found"

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"There is no upload {upload_id!r}.")


class UploadClosed(PagemillError):
    """An upload takes parts only while it is pending."""

    code = "upload_not_pending"

    def __init__(self, upload_id: str, state: str) -> None:
        super().__init__(f"The upload {upload_id} is {state}.")


class WebhookEndpointMissing(PagemillError):
    """No such webhook endpoint, or another tenant's."""

    code = "webhook_endpoint_not_found"

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"There is no webhook endpoint {endpoint_id!r}.")


class WebhookDeliveryMissing(PagemillError):
    """No such delivery, or another tenant's, or one whose endpoint is disabled."""

    code = "webhook_delivery_not_found"

    def __init__(self, delivery_id: str) -> None:
        super().__init__(f"There is no delivery {delivery_id!r}, or its endpoint is disabled.")


class StorageFailed(PagemillError):
    """The store of files' contents is away or refuses; the log says which."""

    code = "storage_unavailable"

    def __init__(self, message: str = "The store of files is not available just now. Nothing was stored.") -> None:
        super().__init__(message)


class StorageFull(StorageFailed):
    """The store's disk is full."""

    code = "insufficient_storage"

    def __init__(self) -> None:
        super().__init__("The disk of the store of files is full. Nothing was stored.")
