"""Bodies of answers about one job: its progress, why it waits, its failures, timeline, results and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import orjson
from pydantic import BaseModel, Field

from api.native import previews
from api.schemas import JobObject, job_fields
from jobs import estimates, fingerprints
from jobs.ids import EVENT_PREFIX, JOB_PREFIX, public_id
from jobs.line_timing import StoredTiming
from jobs.queries import progress
from jobs.queries.explaining import ModelQueue, Wait, explain
from jobs.queries.line_events import LineEvent, NotedEvent
from jobs.queries.lines import Line, LineResult
from jobs.queries.reading import Job


class EtaObject(BaseModel):
    """When the job ends, if it goes on as in the minutes that `basis` names; half of those were within low and high."""

    at: int
    low: int
    high: int
    basis: str


class WaitObject(BaseModel):
    """A reason for programs and one for people; `args` has the figures of the text."""

    code: str = Field(
        description="cancelling, out_of_time, paused, no_worker, other_model, next, alone, priority, older_jobs, live, "
        "fair_share"
    )
    text: str
    args: dict[str, Any]


class ProgressPoint(BaseModel):
    at: int = Field(description="its beginning")
    seconds: int
    lines: int = Field(description="settled, failed ones included")
    failed: int
    prompt: int
    cached: int
    completion: int


class FailureExample(BaseModel):
    line: int
    custom_id: str | None
    message: str | None = Field(description="in full, up to 2,000 characters")


class FailureObject(BaseModel):
    """Lines that failed alike: equal codes, and messages equal but for numbers, quoted text, ids and paths."""

    fingerprint: str
    code: str
    message: str = Field(description="the part that the messages have in common")
    lines: int
    first_at: int
    last_at: int
    example: FailureExample


class TimelineEntry(BaseModel):
    at: int
    kind: str = Field(
        description="created, started, claimed, worker_lost, paused, resumed, priority, renamed, retried, cancelling, "
        "or the state at the end"
    )
    text: str
    detail: dict[str, Any]


class DeliveryObject(BaseModel):
    """A webhook of the job. `status`: pending, delivered or given_up."""

    id: int
    event: str
    type: str
    url: str
    status: str
    attempts: int
    created_at: int
    next_attempt_at: int | None
    delivered_at: int | None
    last_status: int | None
    last_error: str | None


class ResultSummary(BaseModel):
    """A result in short. Texts are those of the first choice."""

    seq: int
    line: int
    custom_id: str
    state: str
    text: str | None
    is_cut: bool = Field(description="there is more of the text")
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    error_code: str | None
    error_message: str | None
    fingerprint: str | None
    settled_at: int | None
    took_ms: int | None = Field(description="from its claim to its result")
    worker: str | None


class Claim(BaseModel):
    """A claim of a line. `number` counts its claims, `deaths` those up to it that ended with their worker."""

    number: int
    deaths: int
    at: int | None = Field(description="null for earlier ones")
    worker: str | None
    host: str | None
    device: str | None
    is_alone: bool = Field(description="nothing else ran beside it, because workers had died of the line")
    end: Literal["lost", "given_back"] | None = Field(description="why it brought no result")
    ended_at: int | None


class LineTiming(BaseModel):
    """Milliseconds: from the job's start to the newest claim, from that to the result, and where those went.

    The parts of `ran_ms` follow each other; null where they were not kept.
    """

    waited_ms: int | None
    ran_ms: int | None
    engine_ms: int | None = Field(default=None, description="tokenized, and queued in the engine")
    grammar_ms: int | None = Field(default=None, description="its grammar was compiled")
    prefill_ms: int | None = Field(default=None, description="its prompt was read, until the first token")
    decode_ms: int | None = Field(default=None, description="until its last token")
    preempted_ms: int | None = Field(default=None, description="out of the batch, to be computed again")
    write_ms: int | None = Field(default=None, description="until its result was on the way to Postgres")
    preemptions: int | None = None


class LineObject(BaseModel):
    """A line. `state`: pending, running, or as it ended."""

    object: Literal["line"] = "line"
    job: str
    line: int
    custom_id: str
    model: str
    state: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: dict[str, Any] = Field(description="that hold for it, the job's included; tools, too")
    result: dict[str, Any] | None = Field(description="`response` and `error` as in a result line")
    seq: int | None
    fingerprint: str | None
    is_truncated: bool
    sent_at: int
    claimed_at: int | None
    settled_at: int | None
    claims: list[Claim]
    timing: LineTiming


class JobDetail(JobObject):
    """A job with how far it is. Parts that were not asked for by `include` are left out."""

    percent: float = Field(description="of its lines, rounded down; 100 only at the end")
    running: int = Field(description="of the open lines, those that workers hold")
    lines_per_second: float = Field(description="over this minute and the one before")
    eta: EtaObject | None = Field(description="null before 20 lines and 30 s, and while it waits")
    wait: WaitObject | None = Field(description="why none of its lines runs; null where one does, and at the end")
    held_back: WaitObject | None = Field(description="while some run: why the others do not")
    progress: list[ProgressPoint] | None = None
    failures: list[FailureObject] | None = None
    timeline: list[TimelineEntry] | None = None
    deliveries: list[DeliveryObject] | None = None
    results: list[ResultSummary] | None = None


class JobRow(JobObject):
    """A job as a list shows it. `eta`, `wait` and `held_back` are those of the job by itself."""

    tenant: str
    running: int = Field(description="of the open lines, those that workers hold")
    rate: float = Field(description="lines a second over this minute and the one before; 0 at the end")
    spark: list[float] = Field(description="lines a second of the last whole minutes, 30 at most, oldest first")
    eta: EtaObject | None
    wait: WaitObject | None
    held_back: WaitObject | None


class JobList(BaseModel):
    """Newest first. The next page is `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[JobRow]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_rows(
    jobs: Sequence[Job],
    tenants: Mapping[UUID, str],
    queues: Mapping[str, ModelQueue],
    paces: Mapping[UUID, progress.Pace],
) -> list[JobRow]:
    """Rows of jobs, with their tenants' names, and of the open ones the queues of their models and their paces."""
    rows = []
    for job in jobs:
        shown: dict[str, Any] = {"running": 0, "rate": 0.0, "spark": [], "eta": None, "wait": None, "held_back": None}
        if not job.is_terminal:
            shown |= standing(job, queues[job.model], paces[job.id])
            shown["rate"] = round(paces[job.id].lines_per_second, 3)
            shown["spark"] = list(paces[job.id].spark)
        rows.append(JobRow.model_validate(job_fields(job) | shown | {"tenant": tenants[job.tenant_id]}))
    return rows


def standing(job: Job, queue: ModelQueue, pace: progress.Pace) -> dict[str, Any]:
    """Of an open job: how many lines run, when it ends, and why nothing or no more of it runs."""
    running = min(queue.running.get(job.id, 0), job.open)
    reason = wait_object(explain(job, queue))
    return {
        "running": running,
        "eta": eta_object(pace.estimate) if queue.live_workers else None,
        "wait": None if running else reason,
        "held_back": reason if running else None,
    }


def eta_object(found: estimates.Estimate | None) -> EtaObject | None:
    if found is None:
        return None
    return EtaObject(at=_unix(found.at), low=_unix(found.low), high=_unix(found.high), basis=found.basis)


def wait_object(reason: Wait | None) -> WaitObject | None:
    return None if reason is None else WaitObject(code=reason.code, text=reason.text, args=dict(reason.args))


def point_object(point: progress.Point) -> ProgressPoint:
    return ProgressPoint(
        at=_unix(point.at),
        seconds=point.seconds,
        lines=point.lines,
        failed=point.failed,
        prompt=point.prompt_tokens,
        cached=point.cached_tokens,
        completion=point.completion_tokens,
    )


def failure_object(group: progress.FailureGroup) -> FailureObject:
    message = None
    if group.example is not None:
        *_, error = previews.read_body(group.example)
        message = previews.cut(error.get("message"), 2000)
    return FailureObject(
        fingerprint=fingerprints.public(group.fingerprint),
        code=group.code,
        message=group.message,
        lines=group.lines,
        first_at=_unix(group.first_at),
        last_at=_unix(group.last_at),
        example=FailureExample(line=group.first_line, custom_id=group.custom_id, message=message),
    )


def delivery_object(delivery: progress.Delivery) -> DeliveryObject:
    status = "given_up" if delivery.given_up else "pending" if delivery.delivered_at is None else "delivered"
    return DeliveryObject(
        id=delivery.id,
        event=public_id(EVENT_PREFIX, delivery.event_id),
        type=delivery.event_type,
        url=delivery.url,
        status=status,
        attempts=delivery.attempts,
        created_at=_unix(delivery.created_at),
        next_attempt_at=None if delivery.due_at is None else _unix(delivery.due_at),
        delivered_at=None if delivery.delivered_at is None else _unix(delivery.delivered_at),
        last_status=delivery.last_status,
        last_error=delivery.last_error,
    )


def result_summary(result: LineResult, length: int | None) -> ResultSummary:
    return ResultSummary(**previews.summary(result, length))


def line_object(job: Job, line: Line) -> LineObject:
    request: dict[str, Any] = orjson.loads(line.request)
    request.pop("repeated", None)  # for the answer of a response: it says nothing that holds for the line
    claimed, settled = line.claimed_at, line.settled_at
    ran = None
    if claimed is not None and settled is not None and line.worker_id is not None:
        ran = _milliseconds(claimed, settled)
    return LineObject(
        job=public_id(JOB_PREFIX, job.id),
        line=line.line,
        custom_id=line.custom_id,
        model=job.model,
        state=line.state,
        prompt=request.pop("prompt", None),
        messages=request.pop("messages", None),
        params=request,
        result=None if line.result is None else orjson.loads(line.result),
        seq=line.seq,
        fingerprint=None if line.fingerprint is None else fingerprints.public(line.fingerprint),
        is_truncated=bool(line.is_truncated),
        sent_at=_unix(job.in_progress_at),
        claimed_at=None if claimed is None else _unix(claimed),
        settled_at=None if settled is None else _unix(settled),
        claims=_claims(line),
        timing=LineTiming(
            waited_ms=None if claimed is None else _milliseconds(job.in_progress_at, claimed),
            ran_ms=ran,
            **_phases(line),
        ),
    )


def _phases(line: Line) -> dict[str, int]:
    timing = StoredTiming.read(line.timing)
    if timing is None:
        return {}
    return {name if name == "preemptions" else f"{name}_ms": number for name, number in asdict(timing).items()}


def _claims(line: Line) -> list[Claim]:
    """Those of which something is noted, and the newest, in their order."""
    if line.epoch == 0:
        return []
    noted: dict[int, list[NotedEvent]] = {line.epoch: []}
    for event in line.events:
        noted.setdefault(event.epoch, []).append(event)
    deaths = 0
    claims = []
    for number, events in sorted(noted.items()):
        end = next((event for event in events if event.kind is not LineEvent.ALONE), None)
        deaths += end is not None and end.kind is LineEvent.LOST
        is_newest = number == line.epoch
        # Of a claim that was released the row of the line knows no worker any more.
        worker = line if is_newest and line.worker_id is not None else next(iter(events), line)
        claims.append(
            Claim(
                number=number,
                deaths=line.deaths if is_newest else deaths,
                at=_unix(line.claimed_at) if is_newest and line.claimed_at is not None else None,
                worker=None if worker.worker_id is None else str(worker.worker_id),
                host=worker.host,
                device=worker.device,
                is_alone=any(event.kind is LineEvent.ALONE for event in events),
                end=None if end is None else "lost" if end.kind is LineEvent.LOST else "given_back",
                ended_at=None if end is None else _unix(end.at),
            )
        )
    return claims


def timeline(job: Job, events: list[progress.JobEvent]) -> list[TimelineEntry]:
    """A job's moments and events in their order."""
    entries = [TimelineEntry(at=_unix(job.created_at), kind="created", text="Its first line came in.", detail={})]
    entries.append(
        TimelineEntry(
            at=_unix(job.in_progress_at),
            kind="started",
            text=f"All of its {job.total:,} lines were stored, and workers may take them.",
            detail={"lines": job.total},
        )
    )
    entries += [event_entry(event) for event in events]
    if job.cancelling_at is not None:
        text = "Its owner asked to stop it."
        entries.append(TimelineEntry(at=_unix(job.cancelling_at), kind="cancelling", text=text, detail={}))
    if job.ended_at is not None:
        entries.append(
            TimelineEntry(
                at=_unix(job.ended_at),
                kind=job.state,
                text=f"It ended as {job.state}: {job.completed:,} lines completed, {job.failed:,} failed.",
                detail={"completed": job.completed, "failed": job.failed},
            )
        )
    return sorted(entries, key=lambda entry: entry.at)


def event_entry(event: progress.JobEvent) -> TimelineEntry:
    return TimelineEntry(
        at=_unix(event.at), kind=event.kind, text=event_text(event.kind, event.detail), detail=dict(event.detail)
    )


def event_text(kind: str, detail: Mapping[str, object]) -> str:
    """A sentence for an event of `jobs.queries.job_events`."""
    match kind:
        case "claimed":
            return f"A worker on {detail['host']} took its first lines."
        case "worker_lost":
            return f"A worker on {detail['host']} was lost; {detail['lines']} of its lines wait again."
        case "paused":
            return "It was paused; no line of it is started."
        case "resumed":
            return "It was resumed."
        case "priority":
            return f"Its priority went from {detail['from']} to {detail['to']}."
        case "renamed":
            return f"It was named {detail['to']}."
        case "cancelled_by_operator":
            return "An operator of this service cancelled it."
        case "retried":
            return f"{detail['lines']} of its lines run again as {detail['job']}."
        case _:
            return kind


def _milliseconds(start: datetime, end: datetime) -> int:
    return max(0, round(1000 * (end - start).total_seconds()))


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())
