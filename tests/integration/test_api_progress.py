"""One job as its page reads it: progress, estimate, reason, failures, timeline, deliveries, results."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

from jobs.fingerprints import Failure, public
from jobs.ids import public_id
from jobs.queries.settling import Outcome, settle
from jobs.settings import Settings
from jobs.states import RequestState
from tests.support.api_server import Api, error_of, running_api
from tests.support.rows import Rows, answered
from worker.generation.responses import refused

EVERYTHING = "progress,failures,timeline,deliveries,results"


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Claims take what waits, also what an earlier test left."""
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM workers")


def detail(api: Api, job_id: UUID, include: str | None = None) -> dict[str, object]:
    query = {} if include is None else {"include": include}
    response = api.client.get(f"/v1/jobs/{public_id('job_', job_id)}", params=query)
    assert response.status_code == 200, response.text
    found: dict[str, object] = response.json()
    return found


def test_job_that_waits_says_why(api: Api, api_rows: Rows) -> None:
    job = detail(api, api_rows.job(3))
    assert job["wait"] == {"code": "no_worker", "text": "No live worker for demo.", "args": job["wait"]["args"]}  # type: ignore[index]
    assert (job["percent"], job["running"], job["eta"], job["held_back"]) == (0.0, 0, None, None)
    assert set(job).isdisjoint(EVERYTHING.split(","))


def test_job_that_runs_says_why_its_other_lines_do_not(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(5)
    api_rows.settle(api_rows.claim(api_rows.worker(), limit=2).requests[:1])
    job = detail(api, job_id)
    assert (job["percent"], job["running"], job["wait"]) == (20.0, 1, None)
    assert isinstance(job["held_back"], dict)
    assert job["held_back"]["code"] == "next"
    assert isinstance(job["lines_per_second"], float)


def test_job_with_whole_minutes_has_an_estimate_with_its_basis(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(200)
    api_rows.settle(api_rows.claim(api_rows.worker(), limit=60).requests)
    api_rows.execute("UPDATE job_events SET at = at - interval '1 hour'")
    api_rows.execute("UPDATE job_minutes SET minute = minute - interval '2 minutes'")
    job = detail(api, job_id)
    assert isinstance(job["eta"], dict)
    assert job["eta"]["basis"] == "1 lines/s, the mean of the last minute with work"
    assert job["eta"]["low"] == job["eta"]["at"] == job["eta"]["high"]
    api_rows.execute("UPDATE jobs SET paused_at = clock_timestamp()")
    assert detail(api, job_id)["eta"] is None


def test_job_with_everything(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(4, webhook="https://receiver.example/hook")
    worker_id = api_rows.worker()
    claimed = api_rows.claim(worker_id).requests
    message = "The prompt has 900 tokens, more than the context of 128."
    with api_rows.database.begin() as connection:
        settle(connection, [answered(claimed[0]), refused(claimed[1], message, code="context_length_exceeded")])
        settle(connection, [answered(claimed[2]), answered(claimed[3])])
    job = detail(api, job_id, EVERYTHING)
    assert (job["status"], job["percent"], job["wait"], job["eta"]) == ("completed", 100.0, None, None)
    points = job["progress"]
    assert isinstance(points, list)
    assert sum(point["lines"] for point in points) == 4
    assert sum(point["completion"] for point in points) == 6
    template = Failure.of("context_length_exceeded", message)
    assert isinstance(job["failures"], list)
    (group,) = job["failures"]
    assert group["fingerprint"] == public(template.fingerprint)
    assert group["message"] == "The prompt has # tokens, more than the context of #."
    assert (group["lines"], group["code"]) == (1, "context_length_exceeded")
    assert group["example"] == {"line": 2, "custom_id": "request-2", "message": message}
    assert isinstance(job["timeline"], list)
    assert [entry["kind"] for entry in job["timeline"]] == ["created", "started", "claimed", "completed"]
    assert isinstance(job["deliveries"], list)
    (delivery,) = job["deliveries"]
    assert (delivery["type"], delivery["status"], delivery["attempts"]) == ("job.completed", "pending", 0)
    assert isinstance(job["results"], list)
    assert [result["seq"] for result in job["results"]] == [4, 3, 2, 1]
    failed = job["results"][2]
    assert (failed["state"], failed["error_code"], failed["error_message"]) == (
        "failed",
        "context_length_exceeded",
        message,
    )
    assert failed["worker"] == str(worker_id)
    assert failed["took_ms"] >= 0


def test_points_of_a_long_job_are_bounded(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    api_rows.execute(
        "INSERT INTO job_minutes SELECT :id, '2026-01-01'::timestamptz + n * interval '1 minute', 2, 1, 3, 1, 5"
        " FROM generate_series(0, 9999) n",
        id=job_id,
    )
    points = detail(api, job_id, "progress")["progress"]
    assert isinstance(points, list)
    assert 90 <= len(points) <= 180
    assert {point["seconds"] for point in points} == {56 * 60}
    assert sum(point["lines"] for point in points) == 20_000


def test_failure_of_a_removed_body_is_still_listed(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    (request,) = api_rows.claim(api_rows.worker()).requests
    failure = Failure.of("broken", "no reason")
    with api_rows.database.begin() as connection:
        settle(connection, [Outcome(request.token, RequestState.FAILED, b"{}", failure=failure)])
    api_rows.execute("DELETE FROM bodies")
    failures = detail(api, job_id, "failures")["failures"]
    assert isinstance(failures, list)
    assert failures[0]["example"] == {"line": 1, "custom_id": None, "message": None}


def test_include_names_a_part_that_is_not_there(api: Api, api_rows: Rows) -> None:
    response = api.client.get(
        f"/v1/jobs/{public_id('job_', api_rows.job(1))}", params={"include": "progress,everything"}
    )
    assert error_of(response, 400)["param"] == "include"


def test_job_of_another_tenant_is_unknown(api: Api, api_rows: Rows) -> None:
    job_id = public_id("job_", api_rows.job(2, tenant="default"))
    with api.client_of("another") as stranger:
        response = stranger.get(f"/v1/jobs/{job_id}", params={"include": EVERYTHING})
    assert error_of(response, 404)["code"] == "job_not_found"
