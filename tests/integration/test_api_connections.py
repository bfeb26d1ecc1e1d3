"""Connections before and beside requests: slow heads, too many of them, half-closed clients, bytes that are no HTTP."""

from __future__ import annotations

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import httpx
import pytest

from jobs.settings import Settings
from tests.support.api_server import Api, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import Rows

MOST = 20


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    # Heads have all the time in the world here: what ends a connection is something else.
    with running_api(api_settings.model_copy(update={"max_connections": MOST, "head_timeout": PATIENCE})) as running:
        yield running


@pytest.fixture(scope="module")
def hasty_api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings.model_copy(update={"head_timeout": 0.5})) as running:
        yield running


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    with connection.makefile("rb") as file:
        return file.read()


def error_in(answer: bytes, status: int) -> dict[str, object]:
    """The error of a raw answer, which must have this status and the one shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"\r\nx-request-id: req_" in head
    assert b"\r\ncontent-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nhost"], ids=["silence", "half"])
def test_connection_is_closed_when_its_head_does_not_come(hasty_api: Api, sent: bytes) -> None:
    with hasty_api.connect() as connection:
        connection.sendall(sent)
        answer = received(connection)
    if sent:
        assert error_in(answer, 408)["code"] == "request_timeout"
    else:
        assert answer == b""


def test_connection_is_closed_when_its_second_head_does_not_come(hasty_api: Api) -> None:
    with hasty_api.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /healthz HTTP/1.1\r\n")
        answer = received(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert b"HTTP/1.1 408 " in answer


def test_slow_request_is_answered_when_its_head_came_in_time(hasty_api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    response = hasty_api.client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 1.5})
    assert response.json()["status"] == "in_progress"
    api_rows.clear_jobs()


def test_idle_connections_give_way_to_new_ones(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack, caplog.at_level(logging.WARNING, "pagemill.api"):
        idle = [stack.enter_context(api.connect()) for _ in range(3 * MOST)]
        for connection in idle:
            connection.sendall(b"GET /hea")
        with closing(httpx.Client(base_url=api.url, timeout=PATIENCE, trust_env=False)) as client:
            for _ in range(3):
                assert client.get("/healthz").status_code == 200
        with suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
    assert any("connections are open" in record.getMessage() for record in caplog.records)


def test_connection_is_refused_in_words_when_every_other_runs_a_request(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    poll = (
        f"GET /v1/jobs/job_{job_id.hex}?wait=60 HTTP/1.1\r\nhost: x\r\n"
        f"authorization: {api.client.headers['authorization']}\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(api.connect()).sendall(poll)
        state = api.server.server_state
        await_condition(lambda: len(state.tasks) == MOST, "running requests")
        answer = received(stack.enter_context(api.connect()))
        assert error_in(answer, 503)["code"] == "overloaded"
        assert b"\r\nretry-after: " in answer
        api_rows.clear_jobs()  # ends the polls
        await_condition(lambda: not state.tasks, "the end of the polls")


def test_half_closed_client_gets_its_answer_and_its_job(api: Api, api_rows: Rows) -> None:
    body = b'{"model": "demo", "prompts": ["a"]}'
    with api.connect() as connection:
        connection.sendall(
            f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: {api.client.headers['authorization']}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 202 "), answer
    assert len(api_rows.query("SELECT 1 FROM jobs WHERE state = 'in_progress'")) == 1
    api_rows.clear_jobs()


def test_half_closed_client_gets_an_answer_to_each_of_its_requests(api: Api) -> None:
    with api.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection).count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"rubbish\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "malformed_http"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 400, "malformed_http"),
        (b"GET /v1/jobs?a=" + b"x" * 400_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "address_too_long"),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 400_000 + b"\r\n\r\n", 431, "headers_too_large"),
    ],
    ids=["request line", "header", "two lengths", "transfer encoding", "long address", "long header"],
)
def test_bytes_that_are_no_request_are_refused_in_the_shape_of_errors(
    api: Api, sent: bytes, status: int, code: str
) -> None:
    with api.connect() as connection:
        connection.sendall(sent)
        assert error_in(received(connection), status)["code"] == code


def test_broken_chunk_is_refused_in_the_shape_of_errors(api: Api, api_rows: Rows) -> None:
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/jobs?model=demo HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
            b"authorization: %s\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n"
            % api.client.headers["authorization"].encode()
        )
        assert error_in(received(connection), 400)["code"] == "malformed_http"
    await_condition(lambda: not api.server.server_state.tasks, "the end of the upload")
    assert api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_routes_answer_head(api: Api, path: str) -> None:
    response = api.client.head(path)
    assert response.status_code == 200
    assert response.content == b""


def test_client_is_cut_when_it_reads_nothing(api_settings: Settings, api_rows: Rows) -> None:
    job_id = api_rows.job(600)
    api_rows.finish(job_id)
    api_rows.execute(
        "UPDATE results SET body = convert_to(json_build_object('response', repeat('x', 50000), 'error', null)"
        "::text, 'UTF8') WHERE job_id = :id",
        id=job_id,
    )
    with running_api(api_settings.model_copy(update={"body_timeout": 0.5})) as api, api.connect() as connection:
        connection.sendall(
            f"GET /v1/jobs/job_{job_id.hex}/results HTTP/1.1\r\nhost: x\r\n"
            f"authorization: {api.client.headers['authorization']}\r\n\r\n".encode()
        )
        state = api.server.server_state
        await_condition(lambda: bool(state.tasks), "the answer's beginning")
        await_condition(lambda: not state.tasks, "the answer's end")
    api_rows.clear_jobs()


def test_default_bound_leaves_descriptors_for_everything_else(api_settings: Settings) -> None:
    from api.http_protocol import RESERVED_DESCRIPTORS, connections_possible

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = connections_possible()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert possible == soft - RESERVED_DESCRIPTORS
    assert hard == before[1]
