"""The states of jobs and requests, and their transitions. `docs/states.md` draws the same; a test compares them."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """One vocabulary for native jobs and for OpenAI batches."""

    VALIDATING = "validating"
    """Its lines are being stored; invisible until published. The API publishes it, the courier collects it when the
    upload was cut."""
    IN_PROGRESS = "in_progress"
    """Published: workers claim its requests. The writer that settles the last open one ends it."""
    FINALIZING = "finalizing"
    """Every request is settled and an output file is being put together. Kept for the batch-file face: native jobs
    never enter it, since their results are readable while they run."""
    COMPLETED = "completed"
    """Every request has a result or an error of its own. The end."""
    FAILED = "failed"
    """The input did not validate. The end."""
    EXPIRED = "expired"
    """The completion window closed first; what was finished is kept. The end."""
    CANCELLING = "cancelling"
    """The owner asked to stop; open requests are being settled as cancelled, by the API at once and by the courier
    where there are many."""
    CANCELLED = "cancelled"
    """Cancelled, every request settled; what was finished is kept. The end."""


class RequestState(StrEnum):
    """A request is one line of a job."""

    PENDING = "pending"
    """Waits for a worker. A claim takes it; cancel and expiry settle it."""
    RUNNING = "running"
    """Held by one worker under one epoch. That worker's writer settles it or releases it; the reaper releases it
    when the worker's lease ends; cancel and expiry settle it, too."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Wanted(StrEnum):
    """What an operator asks of a worker. Its next heartbeat brings it there."""

    DRAIN = "drain"
    """Claim nothing more, and end when what runs is written."""
    STOP = "stop"
    """End now, and give everything back."""


class EndReason(StrEnum):
    """Why a worker's row ended."""

    STOPPED = "stopped"
    """By itself: a signal, or what an operator wanted."""
    BROKEN = "broken"
    """By itself: its engine or one of its threads broke or hung."""
    LOST = "lost"
    """By the reaper: its lease ran out."""


JOB_TRANSITIONS: frozenset[tuple[JobState, JobState]] = frozenset(
    {
        (JobState.VALIDATING, JobState.IN_PROGRESS),  # published by the API
        (JobState.IN_PROGRESS, JobState.COMPLETED),  # the last open request was settled
        (JobState.IN_PROGRESS, JobState.EXPIRED),  # the same, and some had run out of time
        (JobState.IN_PROGRESS, JobState.CANCELLING),  # the owner asked
        (JobState.CANCELLING, JobState.CANCELLED),  # the last open request was settled
    }
)

REQUEST_TRANSITIONS: frozenset[tuple[RequestState, RequestState]] = frozenset(
    {
        (RequestState.PENDING, RequestState.RUNNING),  # claimed
        (RequestState.RUNNING, RequestState.PENDING),  # released by its worker or by the reaper
        (RequestState.RUNNING, RequestState.COMPLETED),
        (RequestState.RUNNING, RequestState.FAILED),
        (RequestState.PENDING, RequestState.CANCELLED),
        (RequestState.RUNNING, RequestState.CANCELLED),
        (RequestState.PENDING, RequestState.EXPIRED),
        (RequestState.RUNNING, RequestState.EXPIRED),
    }
)

TERMINAL_JOB_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED})
OPEN_REQUEST_STATES = frozenset({RequestState.PENDING, RequestState.RUNNING})
TERMINAL_REQUEST_STATES = frozenset(RequestState) - OPEN_REQUEST_STATES
