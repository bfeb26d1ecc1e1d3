"""A request of OpenAI's face that is sent again makes nothing new, whether its key or the client's count says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.proxies import Proxy
from tests.support.rows import Rows

LINE = json.dumps(
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "1 + 1 ="}}
).encode()
WINDOW = {"endpoint": "/v1/completions", "completion_window": "24h"}


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing(api_rows: Rows) -> None:
    for table in ("creations", "batches", "files", "uploads"):
        api_rows.execute(f"DELETE FROM {table}")


@contextmanager
def losing(api: Api) -> Iterator[tuple[Proxy, openai.OpenAI]]:
    """The official client, behind a network that can lose answers."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    proxy = Proxy((host, int(port)))
    key = api.client.headers["authorization"].removeprefix("Bearer ")
    url = f"http://127.0.0.1:{proxy.port}/v1"
    try:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=2) as client:
            yield proxy, client
    finally:
        proxy.down()


def count(rows: Rows, table: str) -> int:
    condition = {
        "files": "WHERE stored_at IS NOT NULL AND deleted_at IS NULL",
        "upload_parts": "WHERE stored_at IS NOT NULL",
    }.get(table, "")
    ((number,),) = rows.query(f"SELECT count(*) FROM {table} {condition}")
    return int(str(number))


def test_lost_answers_make_nothing_twice(api: Api, api_rows: Rows) -> None:
    with losing(api) as (proxy, client):
        proxy.lose_answers(1)
        file = client.files.create(file=("in.jsonl", LINE), purpose="batch")
        proxy.lose_answers(2)
        batch = client.batches.create(input_file_id=file.id, **WINDOW)  # type: ignore[arg-type]
        proxy.lose_answers(1)
        upload = client.uploads.create(bytes=3, filename="x", mime_type="text/plain", purpose="batch")
        proxy.lose_answers(1)
        part = client.uploads.parts.create(upload.id, data=b"abc")
        assert proxy.lost == 5
        assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"
        assert client.files.retrieve(file.id) == file
        assert client.batches.retrieve(batch.id).input_file_id == file.id
    assert [count(api_rows, table) for table in ("files", "batches", "uploads", "upload_parts")] == [2, 1, 1, 1]


def test_equal_requests_that_are_no_retries_are_two(api: Api, api_rows: Rows) -> None:
    with losing(api) as (_, client):
        files = [client.files.create(file=("in.jsonl", LINE), purpose="batch") for _ in range(2)]
        batches = [client.batches.create(input_file_id=files[0].id, **WINDOW) for _ in range(2)]  # type: ignore[arg-type]
    assert files[0].id != files[1].id
    assert batches[0].id != batches[1].id


def test_first_try_that_ends_after_its_retry_is_that_retry(api: Api, api_rows: Rows) -> None:
    """A client that gave up waiting tries again while its first try is still coming in."""
    body = form("x", LINE)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    retried: list[httpx.Response] = []

    def slowly() -> Iterator[bytes]:
        yield body[:30]
        retried.append(api.client.post("/v1/files", content=body, headers={**headers, "x-stainless-retry-count": "1"}))
        yield body[30:]

    first = api.client_of("default")
    first.headers["authorization"] = api.client.headers["authorization"]
    with first:
        made = first.post("/v1/files", content=slowly(), headers={**headers, "x-stainless-retry-count": "0"})
    assert made.json() == retried[0].json()
    assert count(api_rows, "files") == 1


def form(boundary: str, content: bytes) -> bytes:
    edge = b"--" + boundary.encode()
    return (
        edge
        + b'\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        + edge
        + b'\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
        + content
        + b"\r\n"
        + edge
        + b"--\r\n"
    )


def test_key_answers_with_what_it_made(api: Api, api_rows: Rows) -> None:
    def post(key: str, boundary: str = "x", content: bytes = LINE) -> httpx.Response:
        return api.client.post(
            "/v1/files",
            content=form(boundary, content),
            headers={"content-type": f"multipart/form-data; boundary={boundary}", "idempotency-key": key},
        )

    first = post("one")
    assert post("one", boundary="another").json() == first.json()
    assert post("two").json()["id"] != first.json()["id"]
    refused = post("one", content=LINE + b"\n")
    assert error_of(refused, 422)["code"] == "idempotency_key_reused"
    assert refused.headers["x-should-retry"] == "false"
    # The key is free again when what it made is gone.
    api.client.delete(f"/v1/files/{first.json()['id']}")
    assert post("one", content=LINE + b"\n").status_code == 200
    assert error_of(post(""), 400)["param"] == "idempotency-key"


def test_key_makes_one_batch_of_requests_side_by_side(api: Api, api_rows: Rows) -> None:
    file = api.client.post(
        "/v1/files", content=form("x", LINE), headers={"content-type": "multipart/form-data; boundary=x"}
    ).json()

    def post(_: int) -> str:
        answer = api.client.post(
            "/v1/batches", json={"input_file_id": file["id"], **WINDOW}, headers={"idempotency-key": "side by side"}
        )
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(post, range(16)))) == 1
    assert count(api_rows, "batches") == 1


def test_key_is_not_shared_between_tenants_or_addresses(api: Api, api_rows: Rows) -> None:
    upload = {"bytes": 3, "filename": "x", "mime_type": "text/plain", "purpose": "batch"}
    key = {"idempotency-key": "mine"}
    with api.client_of("other") as other:
        made = [client.post("/v1/uploads", json=upload, headers=key).json()["id"] for client in (api.client, other)]
    assert made[0] != made[1]
    assert api.client.post("/v1/batches", json=upload, headers=key).status_code == 400


def test_expired_record_is_forgotten(api: Api, api_rows: Rows) -> None:
    upload = {"bytes": 3, "filename": "x", "mime_type": "text/plain", "purpose": "batch"}
    key = {"idempotency-key": "old"}
    first = api.client.post("/v1/uploads", json=upload, headers=key).json()["id"]
    api_rows.execute("UPDATE creations SET expires_at = clock_timestamp()")
    assert api.client.post("/v1/uploads", json=upload, headers=key).json()["id"] != first
