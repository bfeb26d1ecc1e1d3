"""What one tick of the feed reads: for everything that some stream shows, the message that says how it is now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel
from sqlalchemy import Connection

from api.feed_items import Found, Key, Scope, Wanted, event
from api.native import views
from api.native.overview import OverviewObject, QueueObject
from api.native.workers import WorkerObject
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import explaining, fleet, overview, progress, reading, searching, tenant_queues, tenants
from jobs.queries.explaining import ModelQueue
from jobs.queries.progress import Pace
from jobs.queries.reading import Job

NEW_COUNTED = 100


def look(connection: Connection, wanted: Wanted, *, limit: int, solo_after_deaths: int) -> dict[Key, Found]:
    """All of it, in one transaction. `limit` is a claim's, as `explaining` needs it."""
    found: dict[Key, Found] = {}
    figures = {scope: overview.read_figures(connection, scope) for scope in wanted.overviews}
    asked = {*wanted.jobs, *wanted.opened}
    known = _known(
        connection,
        {job_id for _, job_id in asked}.union(*map(overview.candidates, figures.values())),
        limit=limit,
        solo_after_deaths=solo_after_deaths,
    )
    for scope, counted in figures.items():
        seen = overview.overview_of(counted, known.jobs, known.queues, known.paces)
        found["overview", scope] = _overview(OverviewObject.of(seen))
    found.update(_jobs(connection, wanted, asked, known))
    for scope in wanted.queues:
        queue = QueueObject.of(tenant_queues.read_queues(connection, scope))
        found["queue", scope] = _alone("queue", queue.model_dump(mode="json"))
    for search in wanted.searches:
        newer = searching.newer_jobs(connection, search.scope, search.terms, search.newest, limit=NEW_COUNTED)
        if newer:
            found["search", search] = _alone(
                "jobs.new", {"count": len(newer), "newest": public_id(JOB_PREFIX, newer[0])}
            )
    if wanted.has_workers:
        workers = fleet.list_workers(connection)
        minutes = fleet.minutes(connection, [worker.id for worker in workers], most=fleet.SPARK_MINUTES)
        shown = [WorkerObject.of(worker, minutes[worker.id]).model_dump(mode="json") for worker in workers]
        found["workers",] = _alone("workers", {"object": "list", "data": shown, "has_more": False})
    return found


@dataclass(frozen=True, slots=True)
class _Known:
    """Jobs, and of the open ones the queues of their models and their paces."""

    jobs: Mapping[UUID, Job]
    queues: Mapping[str, ModelQueue]
    paces: Mapping[UUID, Pace]


def _known(connection: Connection, job_ids: Collection[UUID], *, limit: int, solo_after_deaths: int) -> _Known:
    jobs = reading.find_jobs(connection, job_ids) if job_ids else []
    opened = [job for job in jobs if not job.is_terminal]
    queues = explaining.read_model_queues(
        connection, {job.model for job in opened}, limit=limit, solo_after_deaths=solo_after_deaths
    )
    now = max((queue.now for queue in queues.values()), default=None)
    paces = {} if now is None else progress.read_paces(connection, opened, now)
    return _Known({job.id: job for job in jobs}, queues, paces)


def _alone(name: str, data: Any) -> Found:
    message = event(name, data)
    return Found(message, message)


def _jobs(
    connection: Connection, wanted: Wanted, asked: Collection[tuple[Scope, UUID]], known: _Known
) -> Iterator[tuple[Key, Found]]:
    shown = [known.jobs[job_id] for job_id in {job_id for _, job_id in asked} if job_id in known.jobs]
    names = tenants.names(connection, [job.tenant_id for job in shown]) if shown else {}
    rows = dict(zip((job.id for job in shown), views.job_rows(shown, names, known.queues, known.paces), strict=True))
    messages = {job_id: _row(row) for job_id, row in rows.items()}
    parts: dict[UUID, dict[str, Found]] = {}
    for scope, job_id in asked:
        if job_id not in messages:
            yield ("job", scope, job_id), _alone("gone", {"id": public_id(JOB_PREFIX, job_id)})
            continue
        job = known.jobs[job_id]
        if scope is not None and job.tenant_id != scope:
            continue
        yield ("job", scope, job_id), messages[job_id]
        if (scope, job_id) in wanted.opened:
            if job_id not in parts:
                parts[job_id] = _parts(connection, job)
            for name, part in parts[job_id].items():
                yield ("part", scope, job_id, name), part


def _row(row: views.JobRow) -> Found:
    data = row.model_dump(mode="json")
    moving = {
        "rate": 0,
        "eta": None,
        "wait": row.wait and row.wait.code,
        "held_back": row.held_back and row.held_back.code,
    }
    return Found(event("job", data), orjson.dumps(data | moving))


def _overview(answers: OverviewObject) -> Found:
    data = answers.model_dump(mode="json")
    moving = {
        "lines_per_s": 0,
        "next_done": answers.next_done and answers.next_done.job,
        "worst_wait": answers.worst_wait and (answers.worst_wait.job, answers.worst_wait.code),
    }
    return Found(event("overview", data), orjson.dumps(data | moving))


def _parts(connection: Connection, job: Job) -> dict[str, Found]:
    """What the page of one job shows beside its row. Each replaces what the page has, but `minute`: its last two."""
    job_id = public_id(JOB_PREFIX, job.id)
    reads: dict[str, Callable[[], Sequence[BaseModel]]] = {
        "minute": lambda: [views.point_object(point) for point in progress.read_points(connection, job.id)[-2:]],
        "failures": lambda: [views.failure_object(group) for group in progress.read_failures(connection, job.id)],
        "timeline": lambda: views.timeline(job, progress.read_events(connection, job.id)),
        "deliveries": lambda: [views.delivery_object(one) for one in progress.read_deliveries(connection, job.id)],
    }
    if not job.failed:
        del reads["failures"]
    return {
        name: _alone(name, {"job": job_id, "data": [entry.model_dump(mode="json") for entry in read()]})
        for name, read in reads.items()
    }
