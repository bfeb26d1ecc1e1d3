"""`/v1/workers`: the fleet, and what an operator wants of a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.deps import Caller, InjectedServices, Operator, Services
from api.schemas import seconds
from jobs.errors import WorkerEnded, WorkerNotFound
from jobs.ids import JOB_PREFIX, WORKER_PREFIX, parse_id, public_id
from jobs.queries import fleet
from jobs.queries.fleet import FleetWorker, RunningLine, WorkerMinute
from jobs.queries.tenants import Principal
from jobs.states import EndReason, Wanted

router = APIRouter(prefix="/v1/workers", tags=["workers"])

LINES_SHOWN = 100
DAY_MINUTES = 24 * 60


class WorkerMinuteObject(BaseModel):
    """What a worker did up to this minute, since the one before it."""

    at: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_s: float = Field(description="generated ones")
    preemptions: int
    busy: float = Field(description="share of the time inside steps, 0 to 1")
    running: int
    kv_usage: float

    @classmethod
    def of(cls, minute: WorkerMinute) -> WorkerMinuteObject:
        return cls(
            at=int(minute.at.timestamp()),
            prompt_tokens=minute.prompt_tokens,
            cached_tokens=minute.cached_tokens,
            completion_tokens=minute.completion_tokens,
            tokens_per_s=round(minute.completion_tokens / minute.seconds, 2),
            preemptions=minute.preemptions,
            busy=round(minute.busy, 4),
            running=minute.running,
            kv_usage=round(minute.kv_usage, 4),
        )


class WorkerLine(BaseModel):
    job: str
    line: int
    claimed_at: int | None

    @classmethod
    def of(cls, line: RunningLine) -> WorkerLine:
        return cls(job=public_id(JOB_PREFIX, line.job_id), line=line.line, claimed_at=seconds(line.claimed_at))


class WorkerObject(BaseModel):
    """A worker as its last heartbeat described it. Times are Unix seconds."""

    id: str
    object: Literal["worker"] = "worker"
    name: str = Field(description="host and process")
    model: str = Field(description="that it runs, or turns to, now")
    models: list[str] = Field(description="all that it serves in turn, by name")
    device: str
    status: Literal["live", "draining", "stopping", "stopped", "broken", "lost"]
    wanted: Wanted | None = Field(description="what an operator asked of it")
    started_at: int
    heartbeat_at: int
    ended_at: int | None
    freed: int = Field(description="lines that it held at its end, which run elsewhere")
    seats: int = Field(description="sequences that it runs at once; 0 until the model is loaded")
    running: int
    waiting: int = Field(description="claimed, and not in the batch yet")
    kv_usage: float = Field(description="share of the KV cache in use, 0 to 1")
    prompt_tokens: int
    cached_tokens: int = Field(description="prompt tokens that the prefix cache saved")
    completion_tokens: int
    tokens_per_s: float = Field(description="generated between the last two heartbeats")
    prompt_tokens_per_s: float
    busy: float = Field(description="share of the time between the last two heartbeats inside steps, 0 to 1")
    preemptions: int
    spark: list[float] = Field(description="tokens a second of the last 60 minutes, oldest first")

    @classmethod
    def of(cls, worker: FleetWorker, minutes: Sequence[WorkerMinute] = ()) -> WorkerObject:
        stats = worker.stats
        at_work = stats if worker.is_live else {}
        return cls(
            id=public_id(WORKER_PREFIX, worker.id),
            name=f"{worker.host}-{worker.pid}",
            model=worker.model,
            models=list(worker.models),
            device=worker.device,
            status=_status(worker),
            wanted=worker.wanted,
            started_at=int(worker.started_at.timestamp()),
            heartbeat_at=int(worker.heartbeat_at.timestamp()),
            ended_at=seconds(worker.ended_at),
            freed=worker.freed,
            seats=_count(stats, "seats"),
            running=_count(at_work, "running"),
            waiting=_count(at_work, "waiting") + _count(at_work, "compiling"),
            kv_usage=round(_count(at_work, "kv_blocks_used") / max(1, _count(stats, "kv_blocks")), 4),
            prompt_tokens=_count(stats, "prompt_tokens"),
            cached_tokens=_count(stats, "cached_prompt_tokens"),
            completion_tokens=_count(stats, "output_tokens"),
            tokens_per_s=round(float(at_work.get("tokens_per_second", 0.0)), 2),
            prompt_tokens_per_s=round(float(at_work.get("prompt_tokens_per_second", 0.0)), 2),
            busy=round(float(at_work.get("busy", 0.0)), 4),
            preemptions=_count(stats, "preemptions"),
            spark=[round(minute.completion_tokens / minute.seconds, 2) for minute in minutes],
        )


class WorkerDetail(WorkerObject):
    minutes: list[WorkerMinuteObject] = Field(description="of the last 24 hours, oldest first")
    lines: list[WorkerLine] = Field(description="your lines that it holds, the longest first, 100 at most")


class WorkerList(BaseModel):
    """Live workers, and those that ended within the last hour; in the order in which they started."""

    object: Literal["list"] = "list"
    data: list[WorkerObject]
    has_more: Literal[False] = False


@router.get("")
async def list_workers(caller: Caller, services: InjectedServices) -> WorkerList:
    """The fleet."""
    workers = await services.transaction(fleet.list_workers)
    minutes = await services.transaction(fleet.minutes, [worker.id for worker in workers], most=fleet.SPARK_MINUTES)
    return WorkerList(data=[WorkerObject.of(worker, minutes[worker.id]) for worker in workers])


@router.get("/{worker_id}")
async def get_worker(worker_id: str, caller: Caller, services: InjectedServices) -> WorkerDetail:
    """One worker, with its last 24 hours and those of its lines that are yours (an operator's: all)."""
    worker = await _find(services, worker_id)
    minutes = (await services.transaction(fleet.minutes, [worker.id], most=DAY_MINUTES))[worker.id]
    lines = await services.transaction(fleet.running_lines, worker.id, caller.scope, limit=LINES_SHOWN)
    return WorkerDetail(
        **WorkerObject.of(worker, minutes[-fleet.SPARK_MINUTES :]).model_dump(),
        minutes=[WorkerMinuteObject.of(minute) for minute in minutes],
        lines=[WorkerLine.of(line) for line in lines],
    )


@router.post("/{worker_id}/drain")
async def drain(worker_id: str, operator: Operator, services: InjectedServices) -> WorkerObject:
    """Let a worker claim nothing more, and end when what it holds is written. Its next heartbeat brings it there."""
    return await _want(services, operator, worker_id, Wanted.DRAIN)


@router.post("/{worker_id}/undrain")
async def undrain(worker_id: str, operator: Operator, services: InjectedServices) -> WorkerObject:
    """Take a worker back that drains and has not ended."""
    return await _want(services, operator, worker_id, None)


@router.post("/{worker_id}/stop")
async def stop(worker_id: str, operator: Operator, services: InjectedServices) -> WorkerObject:
    """End a worker, and give its lines back at once: they run elsewhere. Its next heartbeat brings it there."""
    return await _want(services, operator, worker_id, Wanted.STOP)


async def _want(services: Services, operator: Principal, worker_id: str, wanted: Wanted | None) -> WorkerObject:
    worker = await _find(services, worker_id)
    if not await services.transaction(fleet.set_wanted, worker.id, wanted, by=operator.actor):
        raise WorkerEnded(worker_id)
    return WorkerObject.of(await _find(services, worker_id))


async def _find(services: Services, worker_id: str) -> FleetWorker:
    identity = parse_id(WORKER_PREFIX, worker_id)
    worker = None if identity is None else await services.transaction(fleet.get_worker, identity)
    if worker is None:
        raise WorkerNotFound(worker_id[:100])
    return worker


def _status(worker: FleetWorker) -> Literal["live", "draining", "stopping", "stopped", "broken", "lost"]:
    match worker.end_reason:
        case EndReason.STOPPED:
            return "stopped"
        case EndReason.BROKEN:
            return "broken"
        case EndReason.LOST:
            return "lost"
        case None:
            return {None: "live", Wanted.DRAIN: "draining", Wanted.STOP: "stopping"}[worker.wanted]  # type: ignore[return-value]


def _count(stats: Mapping[str, Any], name: str) -> int:
    return int(stats.get(name, 0))
