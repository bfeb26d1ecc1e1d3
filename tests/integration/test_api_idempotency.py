"""The same request sent twice is one job, whichever way the first one went."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from uuid import UUID

import httpx
import pytest

from jobs.queries import submission
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import Rows

BODY = b'{"custom_id":"a","prompt":"one"}\n{"custom_id":"b","prompt":"two"}\n'


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    changes = {"stage_chunk_lines": 1, "max_wait": PATIENCE, "body_timeout": PATIENCE}
    with running_api(api_settings.model_copy(update=changes)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear_jobs()


def key(name: str) -> dict[str, str]:
    return {"idempotency-key": name}


def visible(api: Api) -> list[str]:
    return [job["id"] for job in api.client.get("/v1/jobs").json()["data"]]


class Upload:
    """A request whose body comes in two halves: the second when it is told to, or never."""

    def __init__(self, api: Api, rows: Rows, name: str) -> None:
        self._go = threading.Event()
        self._is_cut = False
        self._client = api.client_of("default")
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(
            self._client.post,
            "/v1/jobs",
            params={"model": "demo"},
            content=self._body(),
            headers={"content-type": "application/x-ndjson"} | key(name),
        )
        await_condition(
            lambda: bool(rows.query("SELECT 1 FROM idempotency_keys WHERE key = :key", key=name)), "the key"
        )

    def _body(self) -> Iterator[bytes]:
        first, second = BODY.splitlines(keepends=True)
        yield first
        self._go.wait()
        if self._is_cut:
            raise ConnectionAbortedError
        yield second

    def finish(self) -> httpx.Response:
        self._go.set()
        answer = self._answer.result(PATIENCE)
        self._close()
        return answer

    def cut(self) -> None:
        self._is_cut = True
        self._go.set()
        with pytest.raises(ConnectionAbortedError):
            self._answer.result(PATIENCE)
        self._close()

    def _close(self) -> None:
        self._client.close()
        self._pool.shutdown()


def test_upload_is_the_same_job_when_repeated(api: Api, api_rows: Rows) -> None:
    first = api.upload(BODY, key("again"))
    second = api.upload(iter([BODY[:10], BODY[10:]]), key("again"))
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.headers["location"] == first.headers["location"]
    assert second.json() == first.json()
    api_rows.finish(UUID(hex=first.json()["id"].removeprefix("job_")))
    assert api.upload(BODY, key("again")).json()["status"] == "completed"
    assert visible(api) == [first.json()["id"]]


def test_inline_job_is_the_same_job_when_repeated(api: Api) -> None:
    answers = [
        api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]}, headers=key("inline")) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize(
    ("body", "query"),
    [(BODY + b'"three"\n', {}), (BODY, {"max_tokens": 5}), (BODY, {"priority": 1})],
    ids=["body", "parameter", "priority"],
)
def test_key_is_refused_for_another_request(api: Api, body: bytes, query: dict[str, int]) -> None:
    job = api.upload(BODY, key("mine")).json()
    refused = api.upload(body, key("mine"), **query)
    assert error_of(refused, 422)["code"] == "idempotency_key_reused"
    assert refused.headers["x-should-retry"] == "false"
    assert visible(api) == [job["id"]]


def test_key_is_not_shared_between_tenants(api: Api) -> None:
    job = api.upload(BODY, key("common")).json()
    with closing(api.client_of("other")) as other:
        headers = {"content-type": "application/x-ndjson"} | key("common")
        answer = other.post("/v1/jobs?model=demo", content=b'"else"', headers=headers)
    assert answer.status_code == 202
    assert answer.json()["id"] != job["id"]


def test_second_request_waits_for_the_first(api: Api, api_rows: Rows) -> None:
    first = Upload(api, api_rows, "waiting")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(api.upload, BODY, key("waiting"))
        with pytest.raises(TimeoutError):
            second.result(0.3)
        one = first.finish()
        assert second.result(PATIENCE).json()["id"] == one.json()["id"]
    assert visible(api) == [one.json()["id"]]
    assert len(api_rows.query("SELECT 1 FROM jobs")) == 1


def test_second_request_takes_over_when_the_first_is_cut(api: Api, api_rows: Rows) -> None:
    first = Upload(api, api_rows, "cut")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(api.upload, BODY, key("cut"))
        first.cut()
        answer = second.result(PATIENCE)
    assert answer.status_code == 202
    assert answer.json()["request_counts"]["total"] == 2
    assert visible(api) == [answer.json()["id"]]


def test_second_request_is_refused_after_max_wait(api: Api, api_rows: Rows) -> None:
    first = Upload(api, api_rows, "busy")
    with running_api(api.settings.model_copy(update={"max_wait": 0.3})) as hasty:
        refused = hasty.upload(BODY, key("busy"))
    assert error_of(refused, 409)["code"] == "idempotency_key_in_use"
    assert refused.headers["retry-after"] == "1"
    assert first.finish().status_code == 202


def test_identical_requests_at_once_make_one_job(api: Api, api_rows: Rows) -> None:
    clients = [api.client_of("default") for _ in range(8)]
    document = {"model": "demo", "prompts": ["a", "b", "c"]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda client: client.post("/v1/jobs", json=document, headers=key("race")), clients))
    for client in clients:
        client.close()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api_rows.query("SELECT 1 FROM jobs")) == 1


def test_key_is_free_when_its_body_was_refused(api: Api) -> None:
    assert error_of(api.upload(BODY + b"{", key("refused")), 400)["line"] == 3
    assert api.upload(BODY, key("refused")).status_code == 202


def test_key_is_free_when_its_job_is_deleted(api: Api, api_rows: Rows) -> None:
    job = api.upload(BODY, key("deleted")).json()
    api.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    again = api.upload(BODY, key("deleted"))
    assert again.status_code == 202
    assert again.json()["id"] != job["id"]


def test_published_job_is_not_abandoned(api: Api, api_rows: Rows) -> None:
    """A commit can succeed and its answer be lost: the API gives up then, and the caller sends the request again."""
    job = api.upload(BODY, key("lost")).json()
    with api_rows.database.begin() as connection:
        submission.abandon(connection, UUID(hex=job["id"].removeprefix("job_")))
    assert api.upload(BODY, key("lost")).json()["id"] == job["id"]
