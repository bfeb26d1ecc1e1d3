"""`/v1/overview` and `/v1/queue` against rows that claims and settlements made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from jobs.fingerprints import Failure
from jobs.ids import public_id
from jobs.queries import waits, workers
from jobs.queries.settling import settle
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import RequestState
from tests.support.api_server import Api, running_api
from tests.support.rows import Rows, answered


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(api_rows: Rows) -> None:
    api_rows.clear_jobs()
    for table in ("workers", "wait_minutes"):
        api_rows.execute(f"DELETE FROM {table}")


def test_overview_is_zero_without_jobs(api: Api) -> None:
    answer = api.client.get("/v1/overview").json()
    assert answer["jobs"] == {"open": 0, "moving": 0, "waiting": 0, "paused": 0}
    assert (answer["next_done"], answer["worst_wait"]) == (None, None)
    assert answer["workers"] == {"live": 0, "seats": 0, "running": 0}
    assert answer["failed_today"] == {"lines": 0, "kinds": 0, "share": 0}
    assert api.client.get("/v1/queue").json()["data"] == []


def test_overview_counts_what_moves_waits_and_failed(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    moving = api_rows.job(4)
    api_rows.settle(api_rows.claim(worker_id, 2).requests[:1], RequestState.COMPLETED)
    still = api_rows.job(2)
    api_rows.settle(api_rows.claim(worker_id, 100).requests[-1:])
    api_rows.execute("UPDATE results SET settled_at = settled_at - interval '31 seconds' WHERE job_id = :id", id=still)
    waiting, paused = api_rows.job(3), api_rows.job(3)
    api_rows.execute("UPDATE jobs SET paused_at = now() WHERE id = :id", id=paused)
    api_rows.job(3, tenant="another")
    answer = api.client.get("/v1/overview").json()
    assert answer["jobs"] == {"open": 4, "moving": 1, "waiting": 1, "paused": 1}
    assert answer["worst_wait"]["job"] == public_id("job_", waiting)
    assert answer["lines_per_s"] > 0
    assert answer["workers"]["live"] == 1
    assert public_id("job_", moving) != answer["worst_wait"]["job"]
    with api.client_of("default", Role.OPERATOR) as operator:
        assert operator.get("/v1/overview").json()["jobs"]["open"] == 5


def test_overview_counts_lines_that_failed_today_and_their_kinds(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    for tenant in ("default", "another"):
        api_rows.job(8, tenant=tenant)
        claimed = api_rows.claim(worker_id, 8).requests
        api_rows.settle(claimed[:6])
        failures = [Failure.of("too_long", "1 token"), Failure.of("too_long" if tenant == "default" else "odd", "why")]
        with api_rows.database.begin() as connection:
            outcomes = zip(claimed[6:], failures, strict=True)
            settle(
                connection,
                [replace(answered(request, RequestState.FAILED), failure=kind) for request, kind in outcomes],
            )
    assert api.client.get("/v1/overview").json()["failed_today"] == {"lines": 2, "kinds": 2, "share": 0.25}
    with api.client_of("default", Role.OPERATOR) as operator:
        assert operator.get("/v1/overview").json()["failed_today"] == {"lines": 4, "kinds": 3, "share": 0.25}
    for table in ("tenant_days", "tenant_failures"):
        api_rows.execute(f"UPDATE {table} SET day = day - 1")
    assert api.client.get("/v1/overview").json()["failed_today"] == {"lines": 0, "kinds": 0, "share": 0}


def test_worst_wait_is_a_model_without_a_worker(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    api_rows.lapse(worker_id)
    job_id = api_rows.job(3)
    worst = api.client.get("/v1/overview").json()["worst_wait"]
    assert (worst["job"], worst["code"]) == (public_id("job_", job_id), "no_worker")
    assert worst["text"].startswith("No live worker for demo, last seen ")


def test_idle_worker_beside_waiting_lines_is_told(api: Api, api_rows: Rows) -> None:
    def is_idle(running: int) -> bool:
        stats: dict[str, object] = {"seats": 8, "running": running, "waiting": 0, "busy": 0.5}
        with api_rows.database.begin() as connection:
            workers.heartbeat(connection, worker_id, lease=60, stats=stats)
        answer = api.client.get("/v1/overview").json()
        assert answer["busy"] == 0.5
        return bool(answer["idle_with_work"])

    worker_id = api_rows.worker()
    job_id = api_rows.job(3)
    assert not is_idle(0)  # they came just now
    api_rows.execute(
        "UPDATE jobs SET in_progress_at = in_progress_at - interval '11 seconds' WHERE id = :id", id=job_id
    )
    assert is_idle(0)
    assert not is_idle(1)
    api_rows.claim(worker_id, 3)
    assert not is_idle(0)


def test_queue_shows_waits_as_a_query_by_hand(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    for lines, age in ((90, 2), (10, 400)):
        job_id = api_rows.job(lines)
        api_rows.execute(
            "UPDATE jobs SET in_progress_at = in_progress_at - make_interval(secs => :age) WHERE id = :id",
            id=job_id, age=age,
        )  # fmt: skip
        assert len(api_rows.claim(worker_id, 100).requests) == lines
    waiting = api_rows.job(5, window="1h")
    api_rows.execute("UPDATE jobs SET in_progress_at = now() - interval '1 minute' WHERE id = :id", id=waiting)
    [model] = api.client.get("/v1/queue").json()["data"]
    assert (model["model"], model["workers"]) == ("demo", 1)
    [tenant] = model["tenants"]
    assert (tenant["tenant"], tenant["jobs"], tenant["lines"]) == ("default", 3, 5)
    assert 60 <= tenant["oldest_wait"] < 120
    # By hand: 90 lines waited about 2 s, 10 lines about 400 s. A bucket is 19 % wide, and the test takes its time.
    assert 1.6 < tenant["p50"] < 6
    assert 330 < tenant["p95"] < 520
    assert set(tenant["pressure"]) == {"1h", "6h", "24h"}


def test_pressure_is_what_is_due_by_what_is_made(api: Api, api_rows: Rows) -> None:
    worker_id = api_rows.worker()
    job_id = api_rows.job(1000, window="1h")
    api_rows.settle(api_rows.claim(worker_id, 10).requests)
    # As if these ten had taken the last whole minute: 6 tokens a line, a token a second.
    api_rows.execute("UPDATE job_minutes SET minute = minute - interval '1 minute'")
    [model] = api.client.get("/v1/queue").json()["data"]
    [tenant] = model["tenants"]
    assert model["tokens_per_s"] == 1.0
    assert tenant["tokens"] == 990 * 6
    assert model["seconds_to_empty"] == 990 * 6
    assert tenant["pressure"] == {"1h": 1.65, "6h": 0.275, "24h": 0.069}
    assert api_rows.job_row(job_id).state == "in_progress"


def test_tenant_sees_its_own_share_of_the_queue(api: Api, api_rows: Rows) -> None:
    api_rows.job(3)
    api_rows.job(4, tenant="another")
    [model] = api.client.get("/v1/queue").json()["data"]
    assert [tenant["tenant"] for tenant in model["tenants"]] == ["default"]
    with api.client_of("default", Role.OPERATOR) as operator:
        [model] = operator.get("/v1/queue").json()["data"]
        assert [tenant["tenant"] for tenant in model["tenants"]] == ["another", "default"]


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.9, 1.2), (0.95, 90, 120), (1.0, 90, 120)])
def test_percentile_is_within_its_bucket(share: float, low: float, high: float) -> None:
    buckets = {26: 90, 53: 10}  # that begin at 0.91 and 97 seconds
    found = waits.percentile(buckets, share)
    assert found is not None
    assert low < found < high
    assert waits.percentile({}, share) is None
