"""The tables. Migrations make them (`make check` compares the two); `jobs.queries` is the only code that uses them.

Hot and cold data are apart: `requests` is narrow and updated two or three times a row; `bodies` and `results` are
written once. Bodies are bytea because jsonb and text refuse NUL and a model can generate it. The three have no foreign
key to `jobs`: it would cost a check for each row of a COPY, and a large job is deleted in chunks, job row last.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from jobs.roles import Role
from jobs.states import TERMINAL_REQUEST_STATES, JobState, RequestState

#   tenants ─┬─ api_keys ── login_codes         a link that logs a page in, once
#            ├─ jobs ─┬─ requests ── bodies        one row for each line, key (job_id, line)
#            │        ├─ results                   one row for each settled line, key (job_id, seq)
#            │        ├─ job_minutes, failure_groups, job_events      its progress, written as it happens
#            │        └─ events ── deliveries ─┐    each with its delivery_attempts
#            ├─ webhook_endpoints ─────────────┘
#            ├─ idempotency_keys
#            ├─ creations                     what requests made that may be sent again
#            ├─ batches ── files               of results; a batch has a job once its input is valid
#            ├─ files                          contents lie in the file store, by id
#            └─ uploads ── upload_parts        files that come in parts
#   models      every model that a worker ever served
#   workers ─── worker_minutes                  one row for each process life, with the lease
#   wait_minutes   how long lines had waited when they were claimed

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

NOW = func.clock_timestamp()
MAX_WEIGHT = 1000  # of a tenant


def _state_in(states: Iterable[JobState] | Iterable[RequestState]) -> str:
    return "state IN (" + ", ".join(f"'{state}'" for state in sorted(states)) + ")"


tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("webhook_secret", Text, nullable=False),  # whsec_…: signs, so it cannot be kept as a hash
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("weight", SmallInteger, nullable=False, server_default="1"),  # share of the workers beside other tenants
    CheckConstraint(f"weight BETWEEN 1 AND {MAX_WEIGHT}", name="weight"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", Text, nullable=False, server_default=""),
    Column("role", Text, nullable=False, server_default=Role.READ_WRITE),
    Column("hint", Text, nullable=False),  # the first characters, to tell keys apart in a list
    Column("digest", LargeBinary, nullable=False, unique=True),  # HMAC-SHA256 under the server's pepper
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True)),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_used_at", DateTime(timezone=True)),
    CheckConstraint("role IN (" + ", ".join(f"'{role}'" for role in Role) + ")", name="role"),
)

login_codes = Table(
    "login_codes",
    metadata,
    Column("digest", LargeBinary, primary_key=True),  # HMAC-SHA256 of the code under the server's pepper
    Column("key_id", ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("max_model_len", Integer, nullable=False),
    Column("vocab_size", Integer, nullable=False),
    Column("registered_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("model", ForeignKey("models.name"), nullable=False, index=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("heartbeat_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("lease_expires_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),  # set by its own stop or by the reaper; never unset
    Column("stats", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("wanted", Text),  # what an operator asked of it: drain or stop; its next heartbeat brings it there
    Column("end_reason", Text),
    Column("freed", Integer, nullable=False, server_default="0"),  # lines that it held when it ended
    CheckConstraint("wanted IN ('drain', 'stop')", name="wanted"),
    CheckConstraint("end_reason IN ('stopped', 'broken', 'lost')", name="end_reason"),
    Index("ix_workers_ended_at", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("ix_workers_live", "lease_expires_at", postgresql_where=text("ended_at IS NULL")),
)

# A worker's counters since its start, as its first heartbeat of each minute gave them: rates are their differences.
worker_minutes = Table(
    "worker_minutes",
    metadata,
    Column("worker_id", ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True),
    Column("minute", DateTime(timezone=True), primary_key=True),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("preemptions", BigInteger, nullable=False),
    Column("busy_seconds", Double, nullable=False),  # inside steps
    Column("running", Integer, nullable=False),
    Column("kv_usage", REAL, nullable=False),
)

# How long the lines claimed in a minute had waited, counted by `jobs.queries.waits.bucket`. Each worker has rows of its
# own, so that no claim waits for another's lock.
wait_minutes = Table(
    "wait_minutes",
    metadata,
    Column("minute", DateTime(timezone=True), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("tenant_id", Uuid, primary_key=True),
    Column("worker_id", Uuid, primary_key=True),
    Column("bucket", SmallInteger, primary_key=True),
    Column("lines", Integer, nullable=False),
    postgresql_with={"fillfactor": "50"},
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("name", Text),
    Column("event_types", ARRAY(Text)),  # NULL: named by jobs, which say what it gets
    Column("secret", Text),  # NULL: the tenant's
    Column("old_secret", Text),  # signs, too, until …
    Column("old_secret_until", DateTime(timezone=True)),
    Column("disabled_at", DateTime(timezone=True)),  # the receiver answered 410
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Index(
        "ix_webhook_endpoints_of_jobs", "tenant_id", "url", unique=True, postgresql_where=text("event_types IS NULL")
    ),
    Index("ix_webhook_endpoints_tenant_id_id", "tenant_id", "id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("state", Text, nullable=False),
    Column("model", ForeignKey("models.name"), nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("is_live", Boolean, nullable=False, server_default=text("false")),  # a caller waits: claimed before all else
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("name", Text),  # for people; of `metadata` unless given
    Column("retry_of", Uuid),  # no foreign key: the other job may be deleted first
    Column("webhook_endpoint_id", ForeignKey("webhook_endpoints.id")),
    Column("webhook_events", ARRAY(Text)),  # NULL: every event
    Column("completion_window", Integer),  # seconds; NULL: no deadline
    # Counters: open + completed + failed + cancelled + expired = total, at every moment.
    Column("total", Integer, nullable=False, server_default="0"),
    Column("completed", Integer, nullable=False, server_default="0"),
    Column("failed", Integer, nullable=False, server_default="0"),
    Column("cancelled", Integer, nullable=False, server_default="0"),
    Column("expired", Integer, nullable=False, server_default="0"),
    Column("last_seq", Integer, nullable=False, server_default="0"),  # of the newest result
    Column("prompt_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("completion_tokens", BigInteger, nullable=False, server_default="0"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("staged_at", DateTime(timezone=True), nullable=False, server_default=NOW),  # last line stored
    Column("in_progress_at", DateTime(timezone=True)),  # published
    Column("expires_at", DateTime(timezone=True)),
    Column("paused_at", DateTime(timezone=True)),  # no claim chooses it; NULL again when it is resumed
    Column("cancelling_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    Column("deleted_at", DateTime(timezone=True)),  # invisible from now on; the courier removes the rows
    CheckConstraint(_state_in(JobState), name="state"),
    CheckConstraint("completed + failed + cancelled + expired <= total", name="counters"),
    CheckConstraint("last_seq = completed + failed + cancelled + expired", name="last_seq"),
    Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
    # Jobs that are not at their end: read by claims, maintenance and expiry.
    Index("ix_jobs_open", "model", "state", postgresql_where=text("ended_at IS NULL")),
    Index("ix_jobs_ended_at", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("ix_jobs_deleted_at", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
)

requests = Table(
    "requests",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("line", Integer, primary_key=True),  # 1-based
    Column("state", Text, nullable=False, server_default=RequestState.PENDING),
    Column("epoch", Integer, nullable=False, server_default="0"),  # rises with each claim: the fence
    Column("deaths", SmallInteger, nullable=False, server_default="0"),  # of workers that held it
    Column("prefix", BigInteger, nullable=False, server_default="0"),  # equal where the prompts begin alike
    Column("worker_id", Uuid),  # set exactly while running
    Column("claimed_at", DateTime(timezone=True)),  # the newest claim
    CheckConstraint(_state_in(RequestState), name="state"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="held"),
    Index("ix_requests_pending", "job_id", "prefix", "line", postgresql_where=text("state = 'pending'")),
    # The few that saw a worker die.
    Index("ix_requests_suspect", "job_id", postgresql_where=text("state = 'pending' AND deaths > 0")),
    Index("ix_requests_running", "worker_id", postgresql_where=text("state = 'running'")),
    # Rows are updated in place two or three times: leave room on their page.
    postgresql_with={"fillfactor": "80"},
)

bodies = Table(
    "bodies",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # JSON: prompt or messages, and the sampling parameters
    UniqueConstraint("job_id", "custom_id"),
)

results = Table(
    "results",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("seq", Integer, primary_key=True),  # 1..n in commit order, without a gap
    Column("line", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # JSON: {"response", "error"} as in a result line
    Column("settled_at", DateTime(timezone=True)),
    Column("worker_id", Uuid),  # that held it at its end
    Column("fingerprint", BigInteger),  # of a failed line's kind; `jobs.fingerprints`
    Column("is_truncated", Boolean, nullable=False, server_default=text("false")),  # cut by max_tokens
    UniqueConstraint("job_id", "line"),  # no line is answered twice
    CheckConstraint(_state_in(TERMINAL_REQUEST_STATES), name="state"),
    Index("ix_results_fingerprint", "job_id", "fingerprint", "seq", postgresql_where=text("fingerprint IS NOT NULL")),
    Index("ix_results_without_answer", "job_id", "state", "seq", postgresql_where=text("state <> 'completed'")),
    Index("ix_results_truncated", "job_id", "seq", postgresql_where=text("is_truncated")),
)

job_minutes = Table(
    "job_minutes",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("minute", DateTime(timezone=True), primary_key=True),  # its beginning; minutes without a line have no row
    Column("lines", Integer, nullable=False),  # settled, failed ones included
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Index("ix_job_minutes_minute", "minute"),
    postgresql_with={"fillfactor": "50"},  # the row of this minute is updated with each group
)

failure_groups = Table(
    "failure_groups",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("fingerprint", BigInteger, primary_key=True),  # 0: all kinds after the 200th
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),  # the template that the lines have in common
    Column("lines", Integer, nullable=False),
    Column("first_line", Integer, nullable=False),  # an example
    Column("first_at", DateTime(timezone=True), nullable=False),
    Column("last_at", DateTime(timezone=True), nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    # 1 is the first claim, which takes no lock on the job; the others count from 2 under that lock, in commit order.
    Column("number", SmallInteger, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("kind", Text, nullable=False),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
)

events = Table(
    "events",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE")),
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE")),  # neither: a test
    Column("type", Text, nullable=False),  # job.completed, batch.failed …
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    UniqueConstraint("job_id", "type"),
    UniqueConstraint("batch_id", "type"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("event_id", ForeignKey("events.id", ondelete="CASCADE"), nullable=False),
    Column("endpoint_id", ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False),
    Column("attempts", SmallInteger, nullable=False, server_default="0"),
    # NULL once delivered or given up. A courier that takes a delivery moves this past its own time limit first.
    Column("due_at", DateTime(timezone=True), server_default=NOW),
    Column("delivered_at", DateTime(timezone=True)),
    Column("given_up", Boolean, nullable=False, server_default=text("false")),
    Column("last_status", Integer),
    Column("last_error", Text),
    UniqueConstraint("event_id", "endpoint_id"),
    Index("ix_deliveries_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("ix_deliveries_endpoint_id_id", "endpoint_id", "id"),
)

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", SmallInteger, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("milliseconds", Integer, nullable=False),
    Column("status", Integer),  # NULL: there was no answer
    Column("error", Text),  # NULL: delivered
    Column("answer", LargeBinary, nullable=False),  # the first bytes of its body
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("body_sha256", LargeBinary),  # NULL while the first request is still uploading
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)

creations = Table(
    "creations",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("request", LargeBinary, primary_key=True),  # a hash of what tells the request from others
    Column("body_sha256", LargeBinary, nullable=False),
    Column("object_id", Uuid, nullable=False),  # no foreign key: a file, an upload, a part, a batch or a live job
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False, index=True),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Uuid, nullable=False),  # no foreign key: the file may go once the lines are in `bodies`
    Column("completion_window", Text, nullable=False),  # as it was asked for
    Column("metadata", JSONB),
    Column("on_error", Text, nullable=False, server_default="fail"),
    Column("output_seconds", Integer),  # that the files of results live; NULL: for good
    Column("model", Text),
    Column("errors", JSONB),  # of a failed validation
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE")),  # NULL until the input is valid
    Column("output_file_id", Uuid),
    Column("error_file_id", Uuid),
    Column("holder", Uuid),  # the process that validates or finalizes it, until `held_until`
    Column("held_until", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("failed_at", DateTime(timezone=True)),
    Column("cancelling_at", DateTime(timezone=True)),  # set where it was cancelled before it had a job
    Column("finalized_at", DateTime(timezone=True)),  # the files of results are stored
    CheckConstraint("on_error IN ('fail', 'skip')", name="on_error"),
    UniqueConstraint("job_id"),
    Index("ix_batches_tenant_id_id", "tenant_id", "id"),
    Index("ix_batches_open", "id", postgresql_where=text("failed_at IS NULL AND finalized_at IS NULL")),
    Index("ix_batches_input_file_id", "input_file_id", postgresql_where=text("job_id IS NULL AND failed_at IS NULL")),
)

files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    # Of a file of results: readable while the batch runs, stored when it has ended.
    Column("batch_id", ForeignKey("batches.id", ondelete="SET NULL"), index=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("stored_at", DateTime(timezone=True)),  # NULL while the content still comes in: invisible
    Column("expires_at", DateTime(timezone=True)),
    Column("deleted_at", DateTime(timezone=True)),  # invisible from now on; the courier removes content and row
    Index("ix_files_tenant_id_id", "tenant_id", "id"),
    # What the courier looks for.
    Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    Index("ix_files_leaving", "created_at", postgresql_where=text("stored_at IS NULL OR deleted_at IS NOT NULL")),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("state", Text, nullable=False, server_default="pending"),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),  # as announced; the parts must come to just that
    Column("file_seconds", Integer),  # that the file lives, from its creation; NULL: for good
    Column("file_id", ForeignKey("files.id", ondelete="SET NULL")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')", name="state"),
    Index("ix_uploads_expires_at", "expires_at", postgresql_where=text("state = 'pending'")),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("upload_id", ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("stored_at", DateTime(timezone=True)),  # NULL while the content still comes in
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)
