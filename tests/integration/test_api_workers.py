"""`/v1/workers`: what each does, why one ended, and who may ask something of it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

from jobs.ids import public_id
from jobs.queries import rescue, workers
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import EndReason, Wanted
from tests.support.api_server import Api, error_of, running_api
from tests.support.rows import Rows

STATS: dict[str, object] = {
    "seats": 8, "running": 2, "waiting": 3, "compiling": 1, "kv_blocks": 100, "kv_blocks_used": 25,
    "prompt_tokens": 1000, "cached_prompt_tokens": 400, "output_tokens": 300, "preemptions": 5, "busy_seconds": 10.0,
    "busy": 0.75, "tokens_per_second": 12.5, "prompt_tokens_per_second": 40.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(api_rows: Rows) -> None:
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM workers")


def beat(rows: Rows, worker_id: UUID, **stats: object) -> Wanted | None:
    with rows.database.begin() as connection:
        return workers.heartbeat(connection, worker_id, lease=60, stats=STATS | stats)


def name(worker_id: UUID) -> str:
    return public_id("worker_", worker_id)


def test_worker_shows_what_its_heartbeat_said(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    beat(api_rows, worker_id)
    [worker] = api.client.get("/v1/workers").json()["data"]
    expected = {
        "id": name(worker_id), "model": "demo", "device": "cpu", "status": "live", "wanted": None, "seats": 8,
        "running": 2, "waiting": 4, "kv_usage": 0.25, "prompt_tokens": 1000, "cached_tokens": 400,
        "completion_tokens": 300, "preemptions": 5, "busy": 0.75, "tokens_per_s": 12.5, "ended_at": None,
    }  # fmt: skip
    assert {key: worker[key] for key in expected} == expected


def test_worker_that_loads_its_model_has_no_seats_yet(api: Api, api_rows: Rows) -> None:
    api_rows.worker()
    [worker] = api.client.get("/v1/workers").json()["data"]
    assert (worker["status"], worker["seats"], worker["running"], worker["busy"]) == ("live", 0, 0, 0)


def test_minutes_are_differences_of_counters(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    for age, tokens, busy in ((180, 0, 0.0), (120, 600, 30.0), (60, 600, 30.0), (0, 1800, 90.0)):
        beat(api_rows, worker_id, output_tokens=tokens, busy_seconds=busy)
        with api_rows.database.begin() as connection:
            workers.keep_minute(connection, worker_id)
            workers.keep_minute(connection, worker_id)  # a second one of the same minute changes nothing
        api_rows.execute(
            "UPDATE worker_minutes SET minute = date_trunc('minute', now()) - make_interval(secs => :age) "
            "WHERE minute = (SELECT max(minute) FROM worker_minutes)",
            age=age,
        )
    worker = api.client.get(f"/v1/workers/{name(worker_id)}").json()
    assert worker["spark"] == [10.0, 0.0, 20.0]
    assert [minute["busy"] for minute in worker["minutes"]] == [0.5, 0.0, 1.0]
    assert [minute["completion_tokens"] for minute in worker["minutes"]] == [600, 0, 1200]


def test_ended_worker_says_why_and_how_many_lines_it_held(api: Api, api_rows: Rows) -> None:
    api_rows.job(20)
    lost, broken, stopped, silent = (api_rows.worker() for _ in range(4))
    for worker_id, lines in ((lost, 5), (broken, 4), (stopped, 3)):
        assert len(api_rows.claim(worker_id, lines).requests) == lines
    api_rows.lapse(lost)
    with api_rows.database.begin() as connection:
        assert rescue.reap_worker(connection, max_deaths=3) is not None
        rescue.release_dead_worker(connection, broken, max_deaths=3, reason=EndReason.BROKEN)
        workers.end(connection, stopped)
    api_rows.lapse(silent)  # and no reaper came by yet
    shown = {worker["id"]: worker for worker in api.client.get("/v1/workers").json()["data"]}
    assert [(shown[name(id)]["status"], shown[name(id)]["freed"]) for id in (lost, broken, stopped, silent)] == [
        ("lost", 5), ("broken", 4), ("stopped", 3), ("lost", 0)
    ]  # fmt: skip
    api_rows.execute("UPDATE workers SET ended_at = ended_at - interval '2 hours' WHERE id = :id", id=lost)
    assert name(lost) not in {worker["id"] for worker in api.client.get("/v1/workers").json()["data"]}
    assert api.client.get(f"/v1/workers/{name(lost)}").json()["status"] == "lost"


def test_tenant_sees_its_own_lines_alone(api: Api, api_rows: Rows) -> None:
    mine, theirs = api_rows.job(3), api_rows.job(3, tenant="another")
    worker_id = api_rows.worker()
    api_rows.claim(worker_id, 6)
    lines = api.client.get(f"/v1/workers/{name(worker_id)}").json()["lines"]
    assert {line["job"] for line in lines} == {public_id("job_", mine)}
    assert sorted(line["line"] for line in lines) == [1, 2, 3]
    with api.client_of("default", Role.OPERATOR) as operator:
        lines = operator.get(f"/v1/workers/{name(worker_id)}").json()["lines"]
        assert {line["job"] for line in lines} == {public_id("job_", mine), public_id("job_", theirs)}


def test_operator_asks_and_the_next_heartbeat_hears(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    with api.client_of("default", Role.OPERATOR) as operator:
        for action, status, heard in (
            ("drain", "draining", Wanted.DRAIN),
            ("undrain", "live", None),
            ("stop", "stopping", Wanted.STOP),
        ):
            assert operator.post(f"/v1/workers/{name(worker_id)}/{action}").json()["status"] == status
            assert beat(api_rows, worker_id) is heard
        with api_rows.database.begin() as connection:
            workers.end(connection, worker_id)
        error = error_of(operator.post(f"/v1/workers/{name(worker_id)}/drain"), 409)
        assert error["code"] == "worker_ended"
        assert error_of(operator.post("/v1/workers/worker_x/drain"), 404)["code"] == "worker_not_found"


@pytest.mark.parametrize("action", ["drain", "undrain", "stop"])
def test_tenant_runs_no_worker(api: Api, api_rows: Rows, action: str) -> None:
    worker_id = api_rows.worker()
    error = error_of(api.client.post(f"/v1/workers/{name(worker_id)}/{action}"), 403)
    assert error["code"] == "role_too_narrow"
    assert beat(api_rows, worker_id) is None
