"""Why a job's lines wait: from the same candidates, and the same division of places, as the next claim of its model."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries import claiming
from jobs.queries.claiming import JOBS_PER_TENANT, Candidate, Queue
from jobs.queries.planner import force_index_scans
from jobs.queries.reading import Job
from jobs.states import JobState


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """A model's queue at one moment: what the next claim of an idle worker takes, and who is there to claim."""

    model: str
    now: datetime
    queue: Queue
    suspect: UUID | None
    """A job with a line that runs alone next: workers died while they held it."""

    places: Mapping[UUID, int]
    live_workers: int
    """Those that serve other models in turn included."""

    present: Collection[str]
    """The models that these workers run, or turn to, now."""

    last_seen: datetime | None
    """The newest heartbeat of any worker of the model; None where no row of one is left."""

    by_tenant: Mapping[UUID, Sequence[Candidate]]
    """The candidates of each tenant, in their order."""

    served: Collection[UUID]
    """Tenants of which the next claim takes lines."""

    @property
    def running(self) -> Mapping[UUID, int]:
        """Running requests of each job, of whichever model."""
        return self.queue.running_jobs


@dataclass(frozen=True, slots=True)
class Wait:
    """A reason: `code` for programs, `text` for people, `args` the figures in it; times are Unix seconds."""

    code: str
    text: str
    args: Mapping[str, object] = field(default_factory=dict)


def read_model_queue(connection: Connection, model: str, *, limit: int, solo_after_deaths: int) -> ModelQueue:
    """The queue of a model, divided as a claim of `limit` requests divides it."""
    force_index_scans(connection)  # as a claim does: without statistics the requests would be scanned
    # Rows of ended workers are kept for a while, and few of one model's.
    workers = connection.execute(
        text("""
            WITH served AS (
                SELECT w.model, w.heartbeat_at,
                       w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp() AS is_live
                FROM worker_models s JOIN workers w ON w.id = s.worker_id WHERE s.model = :model
            )
            SELECT clock_timestamp() AS now, max(heartbeat_at) AS last_seen,
                   count(*) FILTER (WHERE is_live) AS live,
                   coalesce(array_agg(DISTINCT model) FILTER (WHERE is_live), '{}') AS present
            FROM served
        """),
        {"model": model},
    ).one()
    alone = claiming.suspect_job(connection, model, solo_after_deaths)
    suspect = None if alone is None else alone.job_id
    queue = claiming.read_queue(connection, model, solo_after_deaths)
    places = queue.places(limit) if suspect is None else {suspect: 1}
    by_tenant: dict[UUID, list[Candidate]] = defaultdict(list)
    for candidate in queue.candidates:
        by_tenant[candidate.tenant_id].append(candidate)
    served = {candidate.tenant_id for candidate in queue.candidates if candidate.job_id in places}
    return ModelQueue(
        model,
        workers.now,
        queue,
        suspect,
        places,
        workers.live,
        workers.present,
        workers.last_seen,
        dict(by_tenant),
        served,
    )


def read_model_queues(
    connection: Connection, models: Collection[str], *, limit: int, solo_after_deaths: int
) -> dict[str, ModelQueue]:
    """The queues of several models."""
    return {
        model: read_model_queue(connection, model, limit=limit, solo_after_deaths=solo_after_deaths) for model in models
    }


def explain(job: Job, queue: ModelQueue) -> Wait | None:
    """Why the job's pending lines are not running. None where it has none."""
    pending = job.open - queue.running.get(job.id, 0)
    if job.is_terminal or pending <= 0:
        return None
    if job.state == JobState.CANCELLING:
        return Wait("cancelling", f"Being cancelled; {_lines(job.open)} still to settle.", {"lines": job.open})
    if job.expires_at is not None and job.expires_at <= queue.now:
        return Wait(
            "out_of_time",
            f"Its completion window closed at {_clock(job.expires_at)}; {_lines(job.open)} are about to expire.",
            {"expires_at": _unix(job.expires_at), "lines": job.open},
        )
    if job.paused_at is not None:
        args: dict[str, object] = {"paused_at": _unix(job.paused_at)}
        said = f"Paused since {_clock(job.paused_at)}."
        if job.expires_at is not None:
            args["expires_at"] = _unix(job.expires_at)
            said += f" Its completion window goes on, and closes at {_clock(job.expires_at)}."
        return Wait("paused", said, args)
    if queue.live_workers == 0:
        return _no_worker(queue)
    if queue.model not in queue.present:
        return _other_model(queue)
    if job.id in queue.places:
        return _next(job, queue)
    if queue.suspect is not None:
        return Wait(
            "alone", "A line that was running when workers died runs alone first; no other line is taken beside it."
        )
    return _behind_others(job, queue)


def _no_worker(queue: ModelQueue) -> Wait:
    if queue.last_seen is None:
        return Wait("no_worker", f"No live worker for {queue.model}.", {"model": queue.model, "last_seen": None})
    return Wait(
        "no_worker",
        f"No live worker for {queue.model}, last seen {_clock(queue.last_seen)}.",
        {"model": queue.model, "last_seen": _unix(queue.last_seen)},
    )


def _other_model(queue: ModelQueue) -> Wait:
    others = ", ".join(sorted(queue.present))
    workers = "Its worker serves" if queue.live_workers == 1 else f"Its {queue.live_workers} workers serve"
    return Wait(
        "other_model",
        f"{workers} {others} now, and {queue.model} when those lines are done or this model has waited long enough.",
        {"model": queue.model, "present": sorted(queue.present), "workers": queue.live_workers},
    )


def _next(job: Job, queue: ModelQueue) -> Wait:
    lines = queue.places[job.id]
    args = {"lines": lines, "workers": queue.live_workers}
    if queue.suspect is not None:
        return Wait("next", "A line that was running when workers died runs next, alone, on an idle worker.", args)
    workers = "the worker has" if queue.live_workers == 1 else f"one of {queue.live_workers} workers has"
    return Wait("next", f"{_lines(lines).capitalize()} of it are next, as soon as {workers} room.", args)


def _behind_others(job: Job, queue: ModelQueue) -> Wait:
    own = queue.by_tenant.get(job.tenant_id, ())
    ahead = own[: bisect_left(own, (-job.priority, job.id), key=lambda one: (-one.priority, one.job_id))]
    lines = sum(candidate.waiting for candidate in ahead)
    if job.tenant_id in queue.served or len(ahead) >= JOBS_PER_TENANT:
        higher = [candidate for candidate in ahead if candidate.priority > job.priority]
        if higher:
            lines = sum(candidate.waiting for candidate in higher)
            return Wait(
                "priority",
                f"Behind {_lines(lines)} of {_jobs(len(higher))} of yours with a higher priority.",
                {"jobs": len(higher), "lines": lines, "priority": job.priority},
            )
        return Wait(
            "older_jobs",
            f"Behind {_lines(lines)} of {_jobs(len(ahead))} of yours that are older.",
            {"jobs": len(ahead), "lines": lines},
        )
    if all(candidate.is_live for candidate in queue.queue.candidates if candidate.job_id in queue.places):
        return Wait("live", "Requests whose callers wait are taken first.")
    running = queue.queue.running.get(job.tenant_id, 0)
    return Wait(
        "fair_share",
        f"{_lines(running).capitalize()} of yours run now, which is your share while other tenants wait."
        if running
        else "Other tenants with fewer running lines for their weight are served first.",
        {"running": running},
    )


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count:,} lines"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _clock(moment: datetime) -> str:
    """`13:02 UTC` within the last or next day, else with the date."""
    moment = moment.astimezone(UTC)
    is_near = abs((datetime.now(UTC) - moment).total_seconds()) < 86_400
    return f"{moment:%H:%M} UTC" if is_near else f"{moment:%Y-%m-%d %H:%M} UTC"


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())
