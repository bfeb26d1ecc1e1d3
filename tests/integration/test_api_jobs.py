"""A job's life as its owner sees it, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock
from uuid import UUID

import pytest
from standardwebhooks import Webhook

from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import await_condition
from tests.support.rows import Rows
from tests.support.services import Services


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    changes = {"stage_chunk_lines": 50, "max_wait": 10}
    with running_api(api_settings.model_copy(update=changes)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Claims take what waits, also what an earlier test left."""
    api_rows.clear_jobs()


def identity(job: dict[str, object]) -> UUID:
    return UUID(hex=str(job["id"]).removeprefix("job_"))


def lines_of(api: Api, job: dict[str, object], **query: int) -> list[dict[str, object]]:
    response = api.client.get(f"/v1/jobs/{job['id']}/results", params=query)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.content.split(b"\n") if line]


class TestSubmission:
    def test_inline_job_is_stored_as_asked_for(self, api: Api, api_rows: Rows) -> None:
        response = api.client.post(
            "/v1/jobs",
            json={
                "model": "demo",
                "prompts": [
                    "plain text",
                    {"custom_id": "ids", "prompt": [1, 2, 3], "max_tokens": 7},
                    {"messages": [{"role": "user", "content": "Grüße \u0000 \u2028"}], "temperature": 0},
                ],
                "params": {"max_tokens": 5, "stop": ["\n"]},
                "priority": 3,
                "metadata": {"run": "7"},
                "webhook": {"url": "https://example.org/hook", "events": ["job.completed"]},
                "completion_window": "24h",
            },
        )
        assert response.status_code == 202
        job = response.json()
        assert response.headers["location"] == f"/v1/jobs/{job['id']}"
        assert job["object"] == "job"
        assert job["status"] == "in_progress"
        assert job["request_counts"] == {
            "total": 3, "open": 3, "completed": 0, "failed": 0, "cancelled": 0, "expired": 0
        }  # fmt: skip
        assert (job["priority"], job["metadata"], job["completion_window"]) == (3, {"run": "7"}, "24h")
        assert job["expires_at"] - job["in_progress_at"] in (86400, 86401)
        stored = api_rows.query("SELECT custom_id, body FROM bodies WHERE job_id = :id ORDER BY line", id=identity(job))
        assert [row.custom_id for row in stored] == ["request-1", "ids", "request-3"]
        assert [json.loads(row.body) for row in stored] == [
            {"max_tokens": 5, "stop": ["\n"], "prompt": "plain text"},
            {"max_tokens": 7, "stop": ["\n"], "prompt": [1, 2, 3]},
            {
                "max_tokens": 5,
                "stop": ["\n"],
                "messages": [{"role": "user", "content": "Grüße \u0000 \u2028"}],
                "temperature": 0,
            },
        ]
        [webhook] = api_rows.query(
            "SELECT url, webhook_events FROM jobs JOIN webhook_endpoints e ON e.id = webhook_endpoint_id "
            "WHERE jobs.id = :id",
            id=identity(job),
        )
        assert (webhook.url, webhook.webhook_events) == ("https://example.org/hook", ["job.completed"])

    def test_upload_takes_its_options_from_the_query(self, api: Api, api_rows: Rows) -> None:
        body = (
            b'\xef\xbb\xbf{"custom_id":"a","prompt":"one"}\r\n\r\n'
            b'"two \xe2\x80\xa8 bare"\n \t\n{"custom_id":"c","prompt":"last"}'
        )
        response = api.client.post(
            "/v1/jobs",
            params=[
                ("model", "demo"),
                ("max_tokens", "5"),
                ("temperature", "0.5"),
                ("stop", "5"),
                ("stop", "x"),
                ("stop_token_ids", "1"),
                ("ignore_eos", "true"),
                ("priority", "-2"),
                ("metadata", '{"run":"8"}'),
                ("webhook_url", "https://example.org/hook"),
                ("webhook_events", "job.completed"),
                ("completion_window", "90m"),
            ],
            content=body,
            headers={"content-type": "application/x-ndjson; charset=utf-8"},
        )
        assert response.status_code == 202, response.text
        job = response.json()
        assert (job["priority"], job["metadata"], job["completion_window"]) == (-2, {"run": "8"}, "90m")
        stored = api_rows.query(
            "SELECT line, custom_id, body FROM bodies WHERE job_id = :id ORDER BY line", id=identity(job)
        )
        assert [(row.line, row.custom_id) for row in stored] == [(1, "a"), (3, "request-3"), (5, "c")]
        params = {"max_tokens": 5, "temperature": 0.5, "stop": ["5", "x"], "stop_token_ids": [1], "ignore_eos": True}
        assert json.loads(stored[1].body) == params | {"prompt": "two \u2028 bare"}

    def test_upload_of_many_groups_is_one_job(self, api: Api, api_rows: Rows) -> None:
        def body() -> Iterator[bytes]:
            for number in range(1234):
                yield b'{"custom_id":"c%d",' % number
                yield b'"prompt":"p"}\n'

        job = api.upload(body()).json()
        assert job["request_counts"]["total"] == 1234
        assert api_rows.states(identity(job)) == ["pending"] * 1234

    def test_gzip_upload_is_decompressed(self, api: Api, api_rows: Rows) -> None:
        import gzip

        packed = gzip.compress(b'"a"\n"b"\n') + gzip.compress(b'"c"\n' * 100)
        job = api.upload(packed, {"content-encoding": "gzip"}).json()
        assert job["request_counts"]["total"] == 102

    def test_byte_order_marks_are_dropped_from_documents_and_from_every_line(self, api: Api) -> None:
        mark = b"\xef\xbb\xbf"
        assert api.upload(mark + b'"a"\n' + mark + b'"b"\n').json()["request_counts"]["total"] == 2
        document = mark + json.dumps({"model": "demo", "prompts": ["a"]}).encode()
        response = api.client.post("/v1/jobs", content=document, headers={"content-type": "application/json"})
        assert response.status_code == 202

    def test_notification_comes_after_the_commit(self, api: Api, api_rows: Rows) -> None:
        """A worker that is woken before the commit finds nothing, and sleeps again for a poll interval."""
        notifier = api.server._app.state.services.notifier
        seen: list[str] = []

        def notify(model: str, job_id: UUID) -> None:
            seen.extend(row.state for row in api_rows.query("SELECT state FROM jobs WHERE id = :id", id=job_id))

        with mock.patch.object(notifier, "notify", notify):
            assert api.upload(b'"a"').status_code == 202
        assert seen == ["in_progress"]

    def test_notification_goes_to_the_queue_of_the_model(
        self, services: Services, api_rows: Rows, tmp_path: Path
    ) -> None:
        import redis

        url = services.redis_database()
        settings = Settings(database_url=api_rows.database_url, redis_url=url, data_dir=tmp_path)
        with running_api(settings) as api, closing(redis.Redis.from_url(url)) as broker:
            job = api.upload(b'"a"').json()
            popped = broker.brpop(["generate.demo"], timeout=60)
            assert isinstance(popped, tuple)
            message = json.loads(popped[1])
            assert message["headers"]["task"] == "pagemill.drain"
            assert job["id"] in message["headers"]["argsrepr"]
            await_condition(lambda: api.client.get("/readyz").json()["notifications_sent"] == 1, "its count")


class TestReading:
    def test_jobs_are_listed_newest_first_in_pages(self, api_rows: Rows, api: Api) -> None:
        with closing(api.client_of("lister")) as client:
            assert client.get("/v1/jobs").json() == {
                "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
            }  # fmt: skip
            ids = [f"job_{api_rows.job(tenant='lister').hex}" for _ in range(5)][::-1]
            page = client.get("/v1/jobs", params={"limit": 2}).json()
            assert [job["id"] for job in page["data"]] == ids[:2]
            assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[1], True)
            page = client.get("/v1/jobs", params={"limit": 3, "after": page["last_id"]}).json()
            assert [job["id"] for job in page["data"]] == ids[2:]
            assert page["has_more"] is False
            client.post(f"/v1/jobs/{ids[3]}/cancel")
            found = client.get("/v1/jobs", params=[("status", "cancelled"), ("status", "expired")]).json()
            assert [job["id"] for job in found["data"]] == [ids[3]]

    def test_long_poll_answers_at_the_end_of_the_job(self, api: Api, api_rows: Rows) -> None:
        job_id = api_rows.job(2)
        began = time.monotonic()
        job = api.client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 0.3}).json()
        assert job["status"] == "in_progress"
        assert time.monotonic() - began >= 0.3
        ending = threading.Timer(0.3, api_rows.finish, [job_id])
        ending.start()
        job = api.client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 60}).json()
        ending.join()
        assert job["status"] == "completed"
        api.client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 60})
        assert time.monotonic() - began < 60

    def test_long_poll_holds_no_connection_while_it_waits(
        self, api_rows: Rows, services: Services, tmp_path: Path
    ) -> None:
        job_id = api_rows.job(1)
        settings = Settings(
            database_url=api_rows.database_url,
            redis_url=services.redis_database(),
            data_dir=tmp_path,
            database_pool_size=1,
        )
        answers: list[str] = []
        with running_api(settings) as api:

            def poll() -> None:
                with closing(api.client_of("default")) as client:
                    answers.append(client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 60}).json()["status"])

            polls = [threading.Thread(target=poll) for _ in range(8)]
            for thread in polls:
                thread.start()
            assert api.client.get("/v1/jobs").status_code == 200
            api_rows.finish(job_id)
            for thread in polls:
                thread.join()
        assert answers == ["completed"] * 8

    def test_results_are_read_by_cursor_while_the_job_runs(self, api: Api, api_rows: Rows) -> None:
        job = api.upload(b"".join(b'{"custom_id":"c%d","prompt":"p"}\n' % number for number in range(300))).json()
        assert lines_of(api, job) == []
        worker = api_rows.worker()
        api_rows.settle(api_rows.claim(worker, 120).requests)
        response = api.client.get(f"/v1/jobs/{job['id']}/results")
        assert (response.headers["x-last-seq"], response.headers["x-job-status"]) == ("120", "in_progress")
        first = lines_of(api, job, limit=70)
        second = lines_of(api, job, after=70)
        assert [line["seq"] for line in first + second] == list(range(1, 121))
        assert lines_of(api, job, after=120) == []
        while claimed := api_rows.claim(worker, 50).requests:
            api_rows.settle(claimed)
        rest = lines_of(api, job, after=120)
        lines = first + second + rest
        assert [line["seq"] for line in lines] == list(range(1, 301))
        assert {line["custom_id"] for line in lines} == {f"c{number}" for number in range(300)}
        assert set(lines[0]) == {"id", "custom_id", "seq", "response", "error"}
        assert lines[0]["response"] == {"status_code": 200}
        assert lines_of(api, job, after=2**31 - 1) == []
        done = api.client.get(f"/v1/jobs/{job['id']}").json()
        assert (done["status"], done["last_seq"]) == ("completed", 300)
        assert done["usage"] == {
            "prompt_tokens": 1200, "cached_tokens": 300, "completion_tokens": 600, "total_tokens": 1800
        }  # fmt: skip

    def test_models_and_webhook_secret_are_shown(self, api: Api) -> None:
        listed = api.client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["demo"]
        one = api.client.get("/v1/models/demo").json()
        assert (one["object"], one["max_model_len"], one["vocab_size"]) == ("model", 128, 100)
        assert error_of(api.client.get("/v1/models/some/other"), 404)["code"] == "model_not_found"
        secret = api.client.get("/v1/webhook_secret").json()["secret"]
        assert Webhook(secret)  # refuses what is no secret
        assert secret == api.client.get("/v1/webhook_secret").json()["secret"]

    def test_health_routes_answer(self, api: Api) -> None:
        assert api.client.get("/healthz").json() == {"status": "ok"}
        ready = api.client.get("/readyz").json()
        assert (ready["postgres"], ready["redis"]) == ("ok", "ok")

    def test_openapi_document_is_complete(self, api: Api) -> None:
        paths = api.client.get("/openapi.json").json()["paths"]
        assert {"/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/results", "/v1/models", "/readyz"} <= set(paths)
        submit = paths["/v1/jobs"]["post"]
        assert set(submit["requestBody"]["content"]) == {"application/json", "application/x-ndjson"}
        named = {parameter["name"] for parameter in submit["parameters"]}
        assert {"model", "max_tokens", "metadata", "webhook_url", "idempotency-key"} <= named

    def test_openapi_document_refers_to_nothing_that_it_does_not_hold(self, api: Api) -> None:
        document = api.client.get("/openapi.json")
        references = set(re.findall(r'"#/components/schemas/([^"]+)"', document.text))
        assert {"Params", "PromptLine", "Webhook"} <= references <= set(document.json()["components"]["schemas"])

    def test_docs_page_loads_nothing_from_elsewhere(self, api: Api) -> None:
        page = api.client.get("/docs")
        assert page.status_code == 200
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(sources) == 3
        for source in sources:
            assert source.startswith("/docs/static/")
            assert api.client.get(source).status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


class TestEnding:
    def test_cancel_keeps_what_is_finished(self, api: Api, api_rows: Rows) -> None:
        job = api.upload(b'"a"\n"b"\n"c"\n"d"\n').json()
        api_rows.settle(api_rows.claim(api_rows.worker(), 1).requests)
        cancelled = api.client.post(f"/v1/jobs/{job['id']}/cancel").json()
        assert cancelled["status"] == "cancelled"
        assert cancelled["request_counts"] == {
            "total": 4, "open": 0, "completed": 1, "failed": 0, "cancelled": 3, "expired": 0
        }  # fmt: skip
        again = api.client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (again.status_code, again.json()) == (200, cancelled)
        assert [line["error"] and line["error"]["code"] for line in lines_of(api, job)] == [None] + [
            "job_cancelled"
        ] * 3

    def test_delete_is_refused_until_the_job_is_at_its_end(self, api: Api, api_rows: Rows) -> None:
        job = api.upload(b'"a"\n').json()
        refused = api.client.delete(f"/v1/jobs/{job['id']}")
        assert error_of(refused, 409)["code"] == "job_not_terminal"
        assert refused.headers["x-should-retry"] == "false"
        api_rows.finish(identity(job))
        deleted = api.client.delete(f"/v1/jobs/{job['id']}")
        assert deleted.json() == {"id": job["id"], "object": "job", "deleted": True}
        for response in (
            api.client.get(f"/v1/jobs/{job['id']}"),
            api.client.get(f"/v1/jobs/{job['id']}/results"),
            api.client.post(f"/v1/jobs/{job['id']}/cancel"),
            api.client.delete(f"/v1/jobs/{job['id']}"),
        ):
            assert error_of(response, 404)["code"] == "job_not_found"
        assert job["id"] not in {listed["id"] for listed in api.client.get("/v1/jobs").json()["data"]}
