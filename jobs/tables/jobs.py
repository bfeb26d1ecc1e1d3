"""Jobs, their lines and results, and a job's progress.

Hot and cold data are apart: `requests` is narrow and updated two or three times a row; `bodies` and `results` are
written once. Bodies are bytea because jsonb and text refuse NUL and a model can generate it. The three have no foreign
key to `jobs`: it would cost a check for each row of a COPY, and a large job is deleted in chunks, job row last.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from jobs.states import TERMINAL_REQUEST_STATES, JobState, RequestState
from jobs.tables.schema import NOW, metadata, state_in

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
    Column("traceparent", Text),  # of the request that made it, where it was traced
    Column("open_params", LargeBinary),  # JSON, of lines to come; NULL once no more can be appended
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
    CheckConstraint(state_in(JobState), name="state"),
    CheckConstraint("completed + failed + cancelled + expired <= total", name="counters"),
    CheckConstraint("last_seq = completed + failed + cancelled + expired", name="last_seq"),
    Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
    Index("ix_jobs_taking_lines", "tenant_id", postgresql_where=text("open_params IS NOT NULL")),
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
    CheckConstraint(state_in(RequestState), name="state"),
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
    Column("timing", LargeBinary),  # where its time went; `jobs.line_timing`
    UniqueConstraint("job_id", "line"),  # no line is answered twice
    CheckConstraint(state_in(TERMINAL_REQUEST_STATES), name="state"),
    Index("ix_results_fingerprint", "job_id", "fingerprint", "seq", postgresql_where=text("fingerprint IS NOT NULL")),
    Index("ix_results_without_answer", "job_id", "state", "seq", postgresql_where=text("state <> 'completed'")),
    Index("ix_results_truncated", "job_id", "seq", postgresql_where=text("is_truncated")),
)

# What was out of order in the first claims of a line; a good line has none. No foreign key, as above.
line_events = Table(
    "line_events",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("epoch", Integer, primary_key=True),  # of the claim
    Column("kind", Text, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("worker_id", Uuid, nullable=False),
    CheckConstraint("kind IN ('lost', 'given_back', 'alone')", name="kind"),
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
