"""Live requests in one API process: at the bound of what waits, in a burst, and left by their callers."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import httpx
import openai
import pytest
from sqlalchemy import text

from api import transactions
from api.openai import live, streams
from jobs import database
from jobs.queries.settling import settle
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import Rows
from worker.generation.responses import Answer, Choice, completed

PATH = "/v1/completions"
ASKED = {"model": "demo", "prompt": "1 + 1 =", "max_tokens": 1}
FLEX = {**ASKED, "service_tier": "flex"}


BURST = 40
DONE = "data: [DONE]\n\n"
# Transactions that wait for a lock for longer than SQLAlchemy's own queue is made to wait here.
BLOCKED = """
    SELECT 1 FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
      AND clock_timestamp() - query_start > interval '1 second'
"""


def open_jobs(rows: Rows) -> int:
    ((number,),) = rows.query("SELECT count(*) FROM jobs WHERE ended_at IS NULL")
    return int(str(number))


def states(rows: Rows) -> set[str]:
    return {str(state) for (state,) in rows.query("SELECT state FROM jobs")}


def post(api: Api, body: dict[str, Any]) -> socket.socket:
    """A connection over which a live request was sent."""
    content = json.dumps(body)
    head = f"POST {PATH} HTTP/1.1\r\nhost: pagemill\r\ncontent-length: {len(content)}\r\n"
    head += f"authorization: {api.client.headers['authorization']}\r\ncontent-type: application/json\r\n\r\n"
    connection = api.connect()
    connection.sendall((head + content).encode())
    return connection


def answer(rows: Rows, worker_id: UUID) -> int:
    """Settle what can be claimed, as a worker does. Returns how many lines that were."""
    claimed = rows.claim(worker_id).requests
    said = Answer([Choice("2", "stop")], prompt_tokens=4, cached_tokens=0, completion_tokens=1)
    with rows.database.begin() as connection:
        settle(connection, [completed(request, "demo", said, is_chat=False) for request in claimed])
    return len(claimed)


@pytest.fixture(scope="module")
def api(api_settings: Settings, api_rows: Rows) -> Iterator[Api]:
    api_rows.worker()
    with running_api(api_settings.model_copy(update={"max_live_requests": 1})) as running:
        yield running


@pytest.fixture(scope="module")
def roomy_api(api_settings: Settings, api_rows: Rows) -> Iterator[Api]:
    api_rows.worker(lease=3600)
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(scope="module")
def waiting(api: Api, api_rows: Rows) -> Iterator[socket.socket]:
    """The connection of the one request that has a place."""
    with contextlib.closing(post(api, FLEX)) as connection:
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
    assert states(api_rows) == {"cancelled"}


@pytest.mark.parametrize("first_wait", [0.0, 3600.0], ids=["after the headers", "before the headers"])
@pytest.mark.parametrize("tier", ["default", "flex"])
def test_caller_that_closes_a_stream_before_its_first_token_ends_its_request(
    roomy_api: Api, api_rows: Rows, monkeypatch: pytest.MonkeyPatch, first_wait: float, tier: str
) -> None:
    """Although nothing is sent that its side could refuse."""
    monkeypatch.setattr(live, "FIRST_WAIT", first_wait)
    monkeypatch.setattr(streams, "KEEP_ALIVE", 3600.0)
    with contextlib.closing(post(roomy_api, {**ASKED, "stream": True, "service_tier": tier})) as connection:
        await_condition(lambda: open_jobs(api_rows) == 1, "the waiting request")
        if first_wait == 0.0:
            # The whole head, because closing with a rest unread would reset the connection.
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            assert head.startswith(b"HTTP/1.1 200")
    await_condition(lambda: open_jobs(api_rows) == 0, "end of the request")
    assert states(api_rows) == {"cancelled"}


def test_burst_of_streams_over_one_connection_to_postgres_is_answered_whole(
    api_settings: Settings, api_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "POOL_TIMEOUT", 0.1)
    monkeypatch.setattr(transactions, "PATIENCE", PATIENCE)
    worker_id = api_rows.worker(lease=3600)
    settings = api_settings.model_copy(update={"database_pool_size": 1, "api_database_timeout": PATIENCE})

    def stream(api: Api) -> str:
        return api.client.post(PATH, json={**ASKED, "stream": True}).text

    with running_api(settings) as api, ThreadPoolExecutor(BURST) as threads:
        with api_rows.database.begin() as connection:
            connection.execute(text("LOCK TABLE bodies IN ACCESS EXCLUSIVE MODE"))
            answers = [threads.submit(stream, api) for _ in range(BURST)]
            await_condition(
                lambda: len(api.server.server_state.connections) == BURST and bool(api_rows.query(BLOCKED)), "the burst"
            )
        num_answered = 0

        def is_answered_or_lost() -> bool:
            nonlocal num_answered
            num_answered += answer(api_rows, worker_id)
            return num_answered == BURST or any(each.done() and not each.result().endswith(DONE) for each in answers)

        await_condition(is_answered_or_lost, "answers")
        assert [each.result()[-len(DONE) :] for each in answers] == [DONE] * BURST
