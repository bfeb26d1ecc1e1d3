"""Jobs in several requests: open, append, finalize."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from jobs.errors import TooManyOpenJobs
from jobs.ids import new_id
from jobs.queries import open_jobs, retention
from jobs.requests import JobOptions
from jobs.settings import Settings
from tests.support.api_server import NDJSON, Api, error_of, running_api
from tests.support.processes import await_condition
from tests.support.rows import Rows


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings.model_copy(update={"max_lines": 50})) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Idempotency-Keys and limits count what an earlier test left."""
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM creations")


def opened(api: Api, **options: Any) -> str:
    answer = api.client.post("/v1/jobs/open", json={"model": "demo", **options})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    job_id: str = answer.json()["id"]
    return job_id


def append(api: Api, job: str, *prompts: object, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"idempotency-key": key}
    return api.client.post(f"/v1/jobs/{job}/lines", json={"prompts": list(prompts)}, headers=headers)


def stored(rows: Rows) -> list[tuple[int, str, dict[str, Any]]]:
    found = rows.query("SELECT line, custom_id, body FROM bodies ORDER BY line")
    return [(row.line, row.custom_id, json.loads(row.body)) for row in found]


def test_appended_lines_run_as_one_job_once_it_is_finalized(api: Api, api_rows: Rows) -> None:
    job = opened(api, params={"max_tokens": 7, "stop": "\0"}, priority=3, name="parts", completion_window="24h")
    shown = api.client.get(f"/v1/jobs/{job}").json()
    assert (shown["status"], shown["in_progress_at"], shown["request_counts"]["total"]) == ("validating", None, 0)
    assert append(api, job, "a", {"prompt": "b", "custom_id": "mine", "max_tokens": 2}).json() == {
        "id": job,
        "object": "job.lines",
        "appended": 2,
        "lines": 2,
    }
    lines = b'{"prompt": "c"}\n\n{"prompt": [1, 2]}'
    assert api.client.post(f"/v1/jobs/{job}/lines", content=lines, headers=NDJSON).json()["lines"] == 4
    assert api.client.get("/v1/jobs").json()["data"] == []
    assert not api_rows.claim(api_rows.worker()).requests
    final = api.client.post(f"/v1/jobs/{job}/finalize")
    assert (final.status_code, final.json()["status"]) == (202, "in_progress")
    assert (final.json()["name"], final.json()["priority"], final.json()["request_counts"]["total"]) == ("parts", 3, 4)
    assert final.json()["expires_at"] - final.json()["in_progress_at"] == 86400
    assert stored(api_rows) == [
        (1, "request-1", {"prompt": "a", "max_tokens": 7, "stop": "\0"}),
        (2, "mine", {"prompt": "b", "max_tokens": 2, "stop": "\0"}),
        (3, "request-3", {"prompt": "c", "max_tokens": 7, "stop": "\0"}),
        (4, "request-4", {"prompt": [1, 2], "max_tokens": 7, "stop": "\0"}),
    ]
    assert len(api_rows.claim(api_rows.worker()).requests) == 4
    api_rows.check()


def test_finalizing_again_changes_nothing_and_no_line_comes_after(api: Api) -> None:
    job = opened(api)
    append(api, job, "a")
    first = api.client.post(f"/v1/jobs/{job}/finalize").json()
    assert api.client.post(f"/v1/jobs/{job}/finalize").json() == first
    refused = append(api, job, "b")
    assert error_of(refused, 409)["code"] == "job_not_open"
    assert refused.headers["x-should-retry"] == "false"
    assert api.client.get(f"/v1/jobs/{job}").json()["request_counts"]["total"] == 1


def test_request_sent_again_stores_nothing_twice(api: Api, api_rows: Rows) -> None:
    made = [
        api.client.post("/v1/jobs/open", json={"model": "demo"}, headers={"idempotency-key": "o"}) for _ in range(2)
    ]
    job = made[0].json()["id"]
    assert made[1].json()["id"] == job
    first = append(api, job, "a", "b", key="one").json()
    assert append(api, job, "c", key="two").json()["lines"] == 3
    assert append(api, job, "a", "b", key="one").json() == first | {"lines": 3}
    assert error_of(append(api, job, "other", key="one"), 422)["code"] == "idempotency_key_reused"
    api.client.post(f"/v1/jobs/{job}/finalize")
    assert append(api, job, "a", "b", key="one").json() == first | {"lines": 3}  # its answer was lost for long
    assert [body["prompt"] for _, _, body in stored(api_rows)] == ["a", "b", "c"]
    assert api_rows.query("SELECT count(*) AS n FROM jobs")[0].n == 1


def test_appends_side_by_side_lose_and_repeat_nothing(api: Api, api_rows: Rows) -> None:
    job = opened(api)

    def send(part: int) -> int:
        with api.client_of("default") as client:
            body = {"prompts": [f"{part} {place}" for place in range(3)]}
            sent = [
                client.post(f"/v1/jobs/{job}/lines", json=body, headers={"idempotency-key": str(part)})
                for _ in range(2)
            ]
        return sum(answer.status_code == 200 for answer in sent)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(send, range(12))) == [2] * 12
    lines = stored(api_rows)
    assert [line for line, _, _ in lines] == list(range(1, 37))
    assert [custom_id for _, custom_id, _ in lines] == [f"request-{line}" for line in range(1, 37)]
    prompts = [body["prompt"] for _, _, body in lines]
    assert sorted(prompts) == sorted(f"{part} {place}" for part in range(12) for place in range(3))
    # Each request is a run by itself.
    assert all(prompts[at].endswith("0") and prompts[at + 2] == prompts[at][:-1] + "2" for at in range(0, 36, 3))


@pytest.mark.parametrize(
    ("prompts", "param", "code"),
    [
        (["a", {"prompt": "b", "temperature": 99}], "prompts[1].temperature", "invalid_request"),
        (["a", {"prompt": "b", "custom_id": "x"}], "custom_id", "duplicate_custom_id"),
        ([], None, "invalid_request"),
    ],
)
def test_wrong_line_refuses_its_request_alone(
    api: Api, api_rows: Rows, prompts: list[Any], param: str | None, code: str
) -> None:
    job = opened(api)
    append(api, job, {"prompt": "first", "custom_id": "x"})
    error = error_of(append(api, job, *prompts), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert append(api, job, "last").json()["lines"] == 2
    assert [body["prompt"] for _, _, body in stored(api_rows)] == ["first", "last"]


def test_wrong_line_of_a_stream_is_named_by_its_place_in_it(api: Api) -> None:
    job = opened(api)
    append(api, job, {"prompt": "first", "custom_id": "x"})
    path = f"/v1/jobs/{job}/lines"
    broken = api.client.post(path, content=b'{"prompt": "a"}\n\n{"prompt": ', headers=NDJSON)
    assert error_of(broken, 400)["line"] == 3
    twice = api.client.post(path, content=b'\n{"prompt": "a"}\n{"prompt": "b", "custom_id": "x"}', headers=NDJSON)
    assert (error_of(twice, 400)["line"], error_of(twice, 400)["code"]) == (3, "duplicate_custom_id")
    assert error_of(api.client.post(path, content=b"", headers=NDJSON), 400)["code"] == "invalid_request"
    assert error_of(api.client.post(path, content=b"x", headers={"content-type": "text/plain"}), 415)


def test_limit_of_lines_holds_for_all_requests_together(api: Api) -> None:
    job = opened(api)
    assert append(api, job, *["a"] * 49).status_code == 200
    assert error_of(append(api, job, "b", "c"), 413)["code"] == "request_too_large"
    assert append(api, job, "b").json()["lines"] == 50


def test_job_without_lines_is_not_finalized(api: Api) -> None:
    job = opened(api)
    assert error_of(api.client.post(f"/v1/jobs/{job}/finalize"), 400)["code"] == "invalid_request"
    assert api.client.get(f"/v1/jobs/{job}").json()["status"] == "validating"


def test_tenant_has_so_many_open_and_no_more(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_jobs, "MOST_OPEN", 2)
    first, _ = opened(api), opened(api)
    assert error_of(api.client.post("/v1/jobs/open", json={"model": "demo"}), 409)["code"] == "too_many_open_jobs"
    with api.client_of("another") as another:
        assert another.post("/v1/jobs/open", json={"model": "demo"}).status_code == 201
    assert api.client.delete(f"/v1/jobs/{first}").json()["deleted"] is True
    assert error_of(append(api, first, "a"), 404)["code"] == "job_not_found"
    opened(api)


def test_opens_side_by_side_keep_to_the_limit(api_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last place is taken by a transaction that is not committed yet."""
    monkeypatch.setattr(open_jobs, "MOST_OPEN", 2)
    tenant_id = api_rows.tenant().id

    def make() -> None:
        with api_rows.database.begin() as connection:
            open_jobs.make(connection, tenant_id, JobOptions(model="demo"), b"{}", new_id(), None)

    make()
    with ThreadPoolExecutor(4) as threads:
        with api_rows.database.begin() as connection:
            open_jobs.make(connection, tenant_id, JobOptions(model="demo"), b"{}", new_id(), None)
            others = [threads.submit(make) for _ in range(4)]
            await_condition(
                lambda: api_rows.count_blocked() == 4 or any(other.done() for other in others), "opens that wait"
            )
        refused = [other.exception() for other in others]
    assert [type(error) for error in refused] == [TooManyOpenJobs] * 4
    assert api_rows.query("SELECT count(*) AS n FROM jobs")[0].n == 2


def test_another_tenants_open_job_is_unknown(api: Api) -> None:
    job = opened(api)
    append(api, job, "a")
    with api.client_of("another") as another:
        for method, path, body in (
            ("GET", "", None),
            ("POST", "/lines", {"prompts": ["b"]}),
            ("POST", "/finalize", None),
            ("DELETE", "", None),
        ):
            answer = another.request(method, f"/v1/jobs/{job}{path}", json=body)
            assert error_of(answer, 404)["code"] == "job_not_found", path
    assert api.client.get(f"/v1/jobs/{job}").json()["request_counts"]["total"] == 1


def test_job_that_is_left_open_expires(api: Api, api_rows: Rows) -> None:
    left, fed = opened(api), opened(api)
    for job in (left, fed):
        append(api, job, "a")
    api_rows.execute("UPDATE jobs SET staged_at = clock_timestamp() - interval '2 hours'")
    append(api, fed, "b")

    def collect(expiry: float) -> int:
        with api_rows.database.begin() as connection:
            return retention.collect_abandoned(connection, staging_timeout=60, open_job_expiry=expiry)

    assert collect(10_800) == 0  # the timeout of an upload is none of theirs
    assert collect(3600) == 1
    assert error_of(api.client.post(f"/v1/jobs/{left}/finalize"), 404)["code"] == "job_not_found"
    assert api.client.post(f"/v1/jobs/{fed}/finalize").json()["request_counts"]["total"] == 2


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nothing"}, 404, "model"),
        ({}, 400, "model"),
        ({"model": "demo", "prompts": ["a"]}, 400, "prompts"),
        ({"model": "demo", "priority": 101}, 400, "priority"),
        ({"model": "demo", "params": {"top_p": 2}}, 400, "params.top_p"),
    ],
)
def test_wrong_options_open_nothing(api: Api, api_rows: Rows, body: dict[str, Any], status: int, param: str) -> None:
    error = error_of(api.client.post("/v1/jobs/open", json=body), status)
    assert error["param"] in (param, f"['{param}']")
    assert api_rows.query("SELECT count(*) AS n FROM jobs")[0].n == 0
