"""Retry, pause, resume, another priority or name: over HTTP, on real rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from uuid import UUID

import httpx
import pytest

from jobs.fingerprints import Failure, public
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries.settling import settle
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.rows import MODEL, Rows
from worker.generation.responses import Answer, Choice, completed, refused

TOO_LONG = Failure.of("context_length_exceeded", "9 tokens")


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    # Chunks of two, so that a few lines are copied in several.
    with running_api(api_settings.model_copy(update={"sweep_chunk": 2, "stage_chunk_lines": 2})) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Claims take what waits, also what an earlier test left."""
    api_rows.clear_jobs()


def ended_job(api: Api, rows: Rows) -> str:
    """Ten lines: 1, 4, 7, 10 answered, the 7th truncated; 2, 5, 8 too long; 3, 6, 9 broken."""
    sent = api.client.post(
        "/v1/jobs",
        json={
            "model": "demo",
            "metadata": {"name": "nightly", "team": "search"},
            "priority": 3,
            "params": {"max_tokens": 7, "temperature": 0},
            "webhook": {"url": "https://receiver.example/hook", "events": ["job.completed"]},
            "prompts": [{"custom_id": f"c{line}", "prompt": f"Grüße \u0000 {line}"} for line in range(1, 11)],
        },
    ).json()
    outcomes = []
    for request in sorted(rows.claim(rows.worker()).requests, key=lambda request: request.line):
        if request.line % 3 == 2:
            outcomes.append(refused(request, f"{request.line} tokens", code=TOO_LONG.code))
        elif request.line % 3 == 0:
            outcomes.append(refused(request, "no reason", code="invalid_request"))
        else:
            choice = Choice("text", "length" if request.line == 7 else "stop")
            answer = Answer([choice], prompt_tokens=4, cached_tokens=0, completion_tokens=2)
            outcomes.append(completed(request, MODEL.name, answer, is_chat=False))
    with rows.database.begin() as connection:
        settle(connection, outcomes)
    rows.check()
    job_id: str = sent["id"]
    return job_id


def identity(job: object) -> UUID:
    return UUID(hex=str(job).removeprefix("job_"))


def retry(api: Api, job_id: str, body: Mapping[str, object] | None = None, key: str | None = None) -> dict[str, object]:
    headers = {} if key is None else {"idempotency-key": key}
    response = api.client.post(f"/v1/jobs/{job_id}/retry", json=body, headers=headers)
    assert response.status_code == 202, response.text
    child: dict[str, object] = response.json()
    assert response.headers["location"] == f"/v1/jobs/{child['id']}"
    return child


def custom_ids(rows: Rows, job: object) -> list[str]:
    found = rows.query("SELECT custom_id FROM bodies WHERE job_id = :id ORDER BY line", id=identity(job))
    return [row.custom_id for row in found]


@pytest.mark.parametrize(
    ("wanted", "lines"),
    [
        (None, [2, 3, 5, 6, 8, 9]),
        ({"state": "failed"}, [2, 3, 5, 6, 8, 9]),
        ({"state": ["truncated", "failed"]}, [7, 2, 3, 5, 6, 8, 9]),
        ({"state": "truncated"}, [7]),
        ({"fingerprint": public(TOO_LONG.fingerprint)}, [2, 5, 8]),
        ({"lines": [10, 3, 3, 1]}, [1, 3, 10]),
    ],
)
def test_retry_makes_a_job_of_exactly_those_lines(
    api: Api, api_rows: Rows, wanted: dict[str, object] | None, lines: list[int]
) -> None:
    parent = ended_job(api, api_rows)
    before = api_rows.query("SELECT * FROM results ORDER BY seq")
    child = retry(api, parent, wanted)
    assert child["retry_of"] == parent
    assert child["request_counts"]["total"] == len(lines)  # type: ignore[index]
    assert custom_ids(api_rows, child["id"]) == [f"c{line}" for line in lines]
    assert (child["name"], child["priority"], child["metadata"]) == (
        "nightly",
        3,
        {"name": "nightly", "team": "search"},
    )
    copied = api_rows.query("SELECT body FROM bodies WHERE job_id = :id ORDER BY line", id=identity(child["id"]))
    assert [json.loads(bytes(row.body)) for row in copied] == [
        {"max_tokens": 7, "temperature": 0.0, "prompt": f"Grüße \u0000 {line}"} for line in lines
    ]
    api_rows.finish(identity(child["id"]))
    assert api_rows.query("SELECT * FROM results WHERE job_id = :id ORDER BY seq", id=identity(parent)) == before
    api_rows.check()
    (delivery,) = api.client.get(f"/v1/jobs/{child['id']}?include=deliveries").json()["deliveries"]
    assert delivery["url"] == "https://receiver.example/hook"
    retried = api.client.get(f"/v1/jobs/{parent}?include=timeline").json()["timeline"]
    assert [entry["detail"] for entry in retried if entry["kind"] == "retried"] == [
        {"job": child["id"], "lines": len(lines)}
    ]


def test_retry_with_parameters_replaces_those_of_each_line(api: Api, api_rows: Rows) -> None:
    parent = ended_job(api, api_rows)
    child = retry(api, parent, {"params": {"max_tokens": 60, "stop": ["."]}, "priority": 9, "name": "again"})
    assert (child["name"], child["priority"]) == ("again", 9)
    rows = api_rows.query(
        "SELECT line, custom_id, body FROM bodies WHERE job_id = :id ORDER BY line", id=identity(child["id"])
    )
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        body = json.loads(bytes(row.body))
        assert (body["max_tokens"], body["stop"], body["temperature"]) == (60, ["."], 0.0)
    api_rows.check()


def test_retry_refuses_parameters_that_no_line_can_have(api: Api, api_rows: Rows) -> None:
    parent = ended_job(api, api_rows)
    body = {"params": {"max_tokens": 128}}
    error = error_of(api.client.post(f"/v1/jobs/{parent}/retry", json=body), 400)
    assert error["param"] == "params.max_tokens"
    assert len(api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL")) == 1


@pytest.mark.parametrize("wanted", [{"state": "expired"}, {"fingerprint": "v1:00000000000000aa"}])
def test_retry_of_nothing_makes_nothing(api: Api, api_rows: Rows, wanted: dict[str, object]) -> None:
    parent = ended_job(api, api_rows)
    response = api.client.post(f"/v1/jobs/{parent}/retry", json=wanted, headers={"idempotency-key": "k0"})
    assert error_of(response, 409)["code"] == "nothing_to_retry"
    assert len(api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL")) == 1


@pytest.mark.parametrize(
    "wanted",
    [
        {"lines": [11]},
        {"lines": []},
        {"state": "completed"},
        {"state": "failed", "lines": [2]},
        {"fingerprint": "7"},
        {"params": {"max_token": 1}},
    ],
)
def test_retry_refuses_a_wrong_choice(api: Api, api_rows: Rows, wanted: dict[str, object]) -> None:
    error_of(api.client.post(f"/v1/jobs/{ended_job(api, api_rows)}/retry", json=wanted), 400)


def test_retry_under_a_key_is_made_once(api: Api, api_rows: Rows) -> None:
    parent = ended_job(api, api_rows)
    first = retry(api, parent, {"state": "failed"}, key="k1")
    assert retry(api, parent, {"state": "failed"}, key="k1")["id"] == first["id"]
    other = api.client.post(f"/v1/jobs/{parent}/retry", json={"state": "truncated"}, headers={"idempotency-key": "k1"})
    assert error_of(other, 422)["code"] == "idempotency_key_reused"
    assert len(api_rows.query("SELECT 1 FROM jobs")) == 2


def test_retry_without_prompts_says_so_and_keeps_nothing(api: Api, api_rows: Rows) -> None:
    parent = ended_job(api, api_rows)
    api_rows.execute("DELETE FROM bodies WHERE line = 9")
    for body in ({}, {"params": {"max_tokens": 9}}):
        error = error_of(api.client.post(f"/v1/jobs/{parent}/retry", json=body), 409)
        assert error["code"] == "prompts_gone"
    assert len(api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL")) == 1


def test_pause_stops_claims_until_resume(api: Api, api_rows: Rows) -> None:
    job = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a", "b"], "completion_window": "1h"}).json()
    worker_id = api_rows.worker()
    running = api_rows.claim(worker_id, limit=1).requests
    paused = api.client.post(f"/v1/jobs/{job['id']}/pause").json()
    assert (paused["status"], paused["expires_at"]) == ("in_progress", job["expires_at"])
    assert paused["paused_at"] is not None
    assert api.client.post(f"/v1/jobs/{job['id']}/pause").json()["paused_at"] == paused["paused_at"]
    assert api_rows.claim(worker_id).requests == ()
    assert api_rows.settle(running).written == 1
    assert api.client.get(f"/v1/jobs/{job['id']}").json()["wait"]["code"] == "paused"
    resumed = api.client.post(f"/v1/jobs/{job['id']}/resume").json()
    assert resumed["paused_at"] is None
    assert len(api_rows.claim(worker_id).requests) == 1
    kinds = [entry["kind"] for entry in api.client.get(f"/v1/jobs/{job['id']}?include=timeline").json()["timeline"]]
    assert kinds == ["created", "started", "claimed", "paused", "resumed"]


def test_priority_and_name_change(api: Api, api_rows: Rows) -> None:
    first = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]}).json()["id"]
    second = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["b"]}).json()["id"]
    changed = api.client.patch(f"/v1/jobs/{second}", json={"priority": 7, "name": "urgent"}).json()
    assert (changed["priority"], changed["name"]) == (7, "urgent")
    assert api.client.patch(f"/v1/jobs/{second}", json={"priority": 7}).status_code == 200
    assert [request.job_id for request in api_rows.claim(api_rows.worker(), limit=1).requests] == [identity(second)]
    timeline = api.client.get(f"/v1/jobs/{second}?include=timeline").json()["timeline"]
    assert [entry["text"] for entry in timeline if entry["kind"] in ("priority", "renamed")] == [
        "Its priority went from 0 to 7.",
        "It was named urgent.",
    ]
    assert api.client.get(f"/v1/jobs/{first}").json()["priority"] == 0
    for body in ({}, {"priority": 101}, {"name": ""}, {"state": "completed"}):
        error_of(api.client.patch(f"/v1/jobs/{first}", json=body), 400)


def test_ended_job_is_not_paused_and_has_its_priority(api: Api, api_rows: Rows) -> None:
    job_id = ended_job(api, api_rows)
    for path in ("pause", "resume"):
        assert error_of(api.client.post(f"/v1/jobs/{job_id}/{path}"), 409)["code"] == "job_not_open"
    assert error_of(api.client.patch(f"/v1/jobs/{job_id}", json={"priority": 1}), 409)["code"] == "job_not_open"
    assert api.client.patch(f"/v1/jobs/{job_id}", json={"name": "done"}).json()["name"] == "done"


def test_actions_on_another_tenants_job_are_404(api: Api, api_rows: Rows) -> None:
    job_id = ended_job(api, api_rows)
    with api.client_of("another") as stranger:
        for path in ("retry", "pause", "resume"):
            assert error_of(stranger.post(f"/v1/jobs/{job_id}/{path}"), 404)["code"] == "job_not_found"
        assert error_of(stranger.patch(f"/v1/jobs/{job_id}", json={"name": "mine"}), 404)["code"] == "job_not_found"
    assert len(api_rows.query("SELECT 1 FROM jobs")) == 1


class TestOperator:
    @pytest.fixture
    def operator(self, api: Api) -> Iterator[httpx.Client]:
        with api.client_of("the house", Role.OPERATOR) as client:
            yield client

    def test_cancels_another_tenants_job_and_the_owner_sees_it(
        self, api: Api, api_rows: Rows, operator: httpx.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = public_id(JOB_PREFIX, api_rows.job(3))
        assert operator.post(f"/v1/jobs/{job}/cancel").json()["request_counts"]["cancelled"] == 2  # a chunk
        assert f"cancelled {job}" in caplog.text
        timeline = api.client.get(f"/v1/jobs/{job}", params={"include": "timeline"}).json()["timeline"]
        assert "cancelled_by_operator" in [entry["kind"] for entry in timeline]

    def test_retries_and_deletes_another_tenants_job(
        self, api: Api, api_rows: Rows, operator: httpx.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = ended_job(api, api_rows)
        child = operator.post(f"/v1/jobs/{job}/retry").json()["id"]
        assert api.client.get(f"/v1/jobs/{child}").json()["retry_of"] == job  # its owner's
        assert operator.delete(f"/v1/jobs/{job}").json()["deleted"] is True
        assert api.client.get(f"/v1/jobs/{job}").status_code == 404
        assert [f"retried {job}" in caplog.text, f"deleted {job}" in caplog.text] == [True, True]
        assert error_of(operator.delete(f"/v1/jobs/{child}"), 409)["code"] == "job_not_terminal"

    def test_owner_is_no_line_in_the_log(self, api: Api, api_rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
        job = public_id(JOB_PREFIX, api_rows.job(1))
        api.client.post(f"/v1/jobs/{job}/cancel")
        api.client.delete(f"/v1/jobs/{job}")
        assert "operator of" not in caplog.text

    def test_without_the_role_another_tenants_job_is_unknown(self, api: Api, api_rows: Rows) -> None:
        job = public_id(JOB_PREFIX, api_rows.job(1))
        with api.client_of("another") as another:
            for method, path in (("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")):
                answer = another.request(method, f"/v1/jobs/{job}{path}")
                assert error_of(answer, 404)["code"] == "job_not_found", path
        assert api.client.get(f"/v1/jobs/{job}").json()["status"] == "in_progress"
