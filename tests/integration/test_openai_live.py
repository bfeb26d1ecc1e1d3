"""Live requests at the bound of what waits in one API process, without a worker."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import await_condition
from tests.support.rows import Rows

PATH = "/v1/completions"
ASKED = {"model": "demo", "prompt": "1 + 1 =", "max_tokens": 1}
FLEX = {**ASKED, "service_tier": "flex"}


def open_jobs(rows: Rows) -> int:
    return rows.query("SELECT count(*) FROM jobs WHERE state = 'in_progress'")[0][0]


@pytest.fixture(scope="module")
def api(api_settings: Settings, api_rows: Rows) -> Iterator[Api]:
    api_rows.worker()
    with running_api(api_settings.model_copy(update={"max_live_requests": 1})) as running:
        yield running


@pytest.fixture(scope="module")
def waiting(api: Api, api_rows: Rows) -> Iterator[socket.socket]:
    """The connection of the one request that has a place."""
    body = json.dumps(FLEX)
    head = f"POST {PATH} HTTP/1.1\r\nhost: pagemill\r\ncontent-length: {len(body)}\r\n"
    head += f"authorization: {api.client.headers['authorization']}\r\ncontent-type: application/json\r\n\r\n"
    with contextlib.closing(api.connect()) as connection:
        connection.sendall((head + body).encode())
        await_condition(lambda: open_jobs(api_rows) == 1, "the waiting request")
        yield connection
    await_condition(lambda: open_jobs(api_rows) == 0, "end of the request whose caller is gone")


@pytest.mark.usefixtures("waiting")
def test_flex_in_a_full_process_is_asked_to_come_later(api: Api) -> None:
    refused = api.client.post(PATH, json=FLEX)
    assert error_of(refused, 429)["code"] == "resource_unavailable"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


@pytest.mark.usefixtures("waiting")
def test_official_client_knows_a_full_process_by_its_rate_limit_error(api: Api) -> None:
    key = api.client.headers["authorization"].removeprefix("Bearer ")
    with (
        openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(**ASKED, extra_body={"service_tier": "flex"})  # type: ignore[call-overload]


@pytest.mark.usefixtures("waiting")
def test_flex_in_the_background_needs_no_place(api: Api) -> None:
    accepted = api.client.post(PATH, json={**FLEX, "background": True})
    assert accepted.status_code == httpx.codes.ACCEPTED
    assert api.client.post(f"{accepted.headers['location']}/cancel").is_success


@pytest.mark.usefixtures("waiting")
def test_other_tiers_in_a_full_process_get_a_retryable_503(api: Api) -> None:
    refused = api.client.post(PATH, json=ASKED)
    assert error_of(refused, 503)["code"] == "unavailable"
    assert "retry-after" in refused.headers


def test_caller_that_closes_its_connection_ends_its_request(api_rows: Rows, waiting: socket.socket) -> None:
    """Although the API sees no more than the end of what the caller sends."""
    waiting.close()
    await_condition(lambda: open_jobs(api_rows) == 0, "end of the request")
    assert api_rows.query("SELECT state FROM jobs ORDER BY id DESC LIMIT 1")[0][0] == "cancelled"
