"""Milestones of running jobs: the events that are announced, their receivers, and their payloads."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import orjson
import pytest

from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import milestones, webhook_endpoints, webhooks
from jobs.queries.milestones import Milestone
from jobs.requests import Webhook, validate
from tests.integration.test_maintenance import maintenance
from tests.support.rows import Rows
from worker.courier.delivery import payload

URL = "https://you.example/hook"


def subscribe(rows: Rows, *types: str, tenant: str = "default") -> UUID:
    owner = rows.tenant(tenant)
    with rows.database.begin() as connection:
        return webhook_endpoints.create(
            connection, owner.id, name="mine", url=URL, event_types=types, secret="whsec_c2VjcmV0"
        ).id


def sweep(rows: Rows, *, stalled_after: float = 300.0) -> None:
    maintenance(rows, stalled_after=stalled_after).announce_milestones(threading.Event())


def told(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    """Types and data of what is delivered since the last look."""
    with rows.database.begin() as connection:
        due = webhooks.take_due(connection, limit=100, per_endpoint=100, under_way=[], hold=60)
        for delivery in due:
            webhooks.mark_delivered(connection, delivery.id, status=200)
    events = [orjson.loads(payload(delivery)) for delivery in due]
    return [(event["type"], event["data"]) for event in events]


def settle_some(rows: Rows, worker_id: UUID, lines: int) -> None:
    rows.settle(rows.claim(worker_id, limit=lines).requests)


def age(rows: Rows, seconds: int) -> None:
    for statement in (
        "UPDATE jobs SET in_progress_at = in_progress_at - make_interval(secs => :s)",
        "UPDATE job_minutes SET minute = minute - make_interval(secs => :s)",
    ):
        rows.execute(statement, s=seconds)


def test_each_milestone_is_told_once_with_the_counters_of_its_moment(rows: Rows) -> None:
    subscribe(rows, "job.first_result", "job.progress_25", "job.progress_50", "job.progress_75", "job.completed")
    job, worker_id = rows.job(8), rows.worker()
    sweep(rows)
    assert told(rows) == []
    settle_some(rows, worker_id, 1)
    sweep(rows)
    sweep(rows)
    ((kind, data),) = told(rows)
    assert kind == "job.first_result"
    assert data == {
        "id": public_id(JOB_PREFIX, job),
        "object": "job",
        "status": "in_progress",
        "model": "demo",
        "metadata": {"made": "for a test"},
        "request_counts": {"total": 8, "completed": 1, "failed": 0, "cancelled": 0, "expired": 0},
    }
    settle_some(rows, worker_id, 4)
    sweep(rows)
    settle_some(rows, worker_id, 1)  # what was announced does not move with the job
    late = told(rows)
    assert sorted(kind for kind, _ in late) == ["job.progress_25", "job.progress_50"]
    assert {data["request_counts"]["completed"] for _, data in late} == {5}
    settle_some(rows, worker_id, 2)
    sweep(rows)
    assert [kind for kind, _ in told(rows)] == ["job.completed"]  # the end overtook the last quarter
    rows.check()


def test_only_subscribers_of_the_type_are_told(rows: Rows) -> None:
    subscribe(rows, "job.progress_50")
    subscribe(rows, "job.first_result", tenant="another")
    rows.job(2)
    settle_some(rows, rows.worker(), 1)
    sweep(rows)
    assert [kind for kind, _ in told(rows)] == ["job.progress_50"]
    assert [row.type for row in rows.query("SELECT type FROM events")] == ["job.progress_50"]


def test_webhook_of_a_job_gets_the_milestones_that_it_names(rows: Rows) -> None:
    rows.job(2, webhook="https://every-end.example")  # without a choice: no milestones
    named = rows.job(2, webhook=URL)
    rows.execute("UPDATE jobs SET webhook_events = ARRAY['job.first_result'] WHERE id = :id", id=named)
    worker_id = rows.worker()
    settle_some(rows, worker_id, 3)
    told(rows)
    sweep(rows)
    assert [(kind, data["id"]) for kind, data in told(rows)] == [("job.first_result", public_id(JOB_PREFIX, named))]
    assert validate(Webhook, {"url": URL, "events": list(milestones.TYPES)}).events == list(milestones.TYPES)


def test_job_that_stands_still_is_told_with_its_reason(rows: Rows) -> None:
    subscribe(rows, "job.stalled")
    rows.job(2)
    sweep(rows)
    assert told(rows) == []
    age(rows, 301)
    sweep(rows)
    sweep(rows)
    ((kind, data),) = told(rows)
    assert (kind, data["reason"]["code"]) == ("job.stalled", "no_worker")
    assert data["reason"]["text"] == "No live worker for demo."
    assert data["reason"]["args"] == {"model": "demo", "last_seen": None}


@pytest.mark.parametrize("why", ["runs", "paused", "young", "settled lately", "ended"])
def test_job_that_does_not_stand_still_is_not_told(rows: Rows, why: str) -> None:
    subscribe(rows, "job.stalled")
    rows.job(2)
    worker_id = rows.worker()
    if why == "runs":
        rows.claim(worker_id, limit=1)
    elif why == "paused":
        rows.execute("UPDATE jobs SET paused_at = clock_timestamp()")
    elif why == "ended":
        settle_some(rows, worker_id, 2)
    age(rows, 200 if why == "young" else 1000)
    if why == "settled lately":
        settle_some(rows, worker_id, 1)
    sweep(rows)
    assert told(rows) == []


def test_live_request_and_disabled_endpoint_are_left_alone(rows: Rows) -> None:
    endpoint = subscribe(rows, "job.first_result", "job.stalled")
    rows.job(2)
    settle_some(rows, rows.worker(), 1)
    rows.execute("UPDATE webhook_endpoints SET disabled_at = clock_timestamp() WHERE id = :id", id=endpoint)
    sweep(rows)
    rows.execute("UPDATE webhook_endpoints SET disabled_at = NULL")
    rows.execute("UPDATE jobs SET is_live = true")
    sweep(rows)
    assert rows.query("SELECT 1 FROM events") == []


def test_milestone_of_a_job_that_ended_in_between_is_left_out(rows: Rows) -> None:
    subscribe(rows, "job.first_result")
    job = rows.job(1)
    settle_some(rows, rows.worker(), 1)
    with rows.database.begin() as connection:
        assert milestones.announce(connection, [Milestone(job, "job.first_result")]) == 0
    assert told(rows) == []
