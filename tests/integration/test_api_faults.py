"""Callers that hang up, Redis and Postgres that are away, full disks, and faults of ours."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest
import redis
import sqlalchemy

from api.long_poll import INTERVAL
from jobs.keys import new_key
from jobs.settings import Settings
from tests.integration.test_database import database_of
from tests.support.api_server import Api, anonymous, error_of, running_api, served
from tests.support.processes import await_condition
from tests.support.proxies import Proxy, proxied
from tests.support.rows import Rows
from tests.support.services import Services

CANARY = "canary-7f3a"
POLLS = 600


@pytest.fixture(scope="module")
def settings(api_settings: Settings) -> Settings:
    return api_settings.model_copy(update={"stage_chunk_lines": 2})


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[Api]:
    with running_api(settings) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear_jobs()


def begin_upload(api: Api, headers: str = "transfer-encoding: chunked", key: str = "cut") -> socket.socket:
    """A connection on which the head of an upload was sent."""
    connection = api.connect()
    connection.sendall(
        (
            "POST /v1/jobs?model=demo HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
            f"authorization: {api.client.headers['authorization']}\r\nidempotency-key: {key}\r\n{headers}\r\n\r\n"
        ).encode()
    )
    return connection


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class TestCallersThatHangUp:
    @pytest.mark.parametrize(
        ("framing", "part"),
        [
            ("transfer-encoding: chunked", chunk(b'"a"\n"b"\n"c"\n') + b"5\r\n"),
            ("content-length: 1000", b'"a"\n"b"\n"c"\n"d'),
            ("transfer-encoding: chunked", chunk(b'"a"\n"b"\n"c"\n') + b"no chunk\r\n"),
        ],
        ids=["in a chunk", "before the announced length", "with rubbish"],
    )
    def test_upload_leaves_nothing_when_cut(self, api: Api, api_rows: Rows, framing: str, part: bytes) -> None:
        with begin_upload(api, framing) as connection:
            connection.sendall(part)
            if not part.endswith(b"no chunk\r\n"):
                await_condition(lambda: bool(api_rows.query("SELECT 1 FROM bodies")), "a stored group")
        await_condition(lambda: api_rows.query("SELECT 1 FROM idempotency_keys") == [], "the key's freedom")
        await_condition(lambda: api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == [], "the job's end")
        assert api.client.get("/v1/jobs").json()["data"] == []
        assert api.upload(b'"a"', {"idempotency-key": "cut"}).status_code == 202

    def test_upload_is_cut_when_it_stops(self, settings: Settings, api_rows: Rows) -> None:
        with running_api(settings.model_copy(update={"body_timeout": 0.5})) as api, begin_upload(api) as connection:
            connection.sendall(chunk(b'"a"\n"b"\n"c"\n'))
            with connection.makefile("rb") as file:
                answer = file.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_timeout"' in answer
        assert api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == []

    def test_upload_is_not_cut_when_it_is_slow(self, settings: Settings) -> None:
        # In all it takes longer than the limit, which is one on each piece; a piece takes a thirtieth of it.
        patience = 3.0
        with (
            running_api(settings.model_copy(update={"body_timeout": patience})) as api,
            begin_upload(api, key="slow") as connection,
        ):
            began = time.monotonic()
            while time.monotonic() - began < 1.1 * patience:
                time.sleep(patience / 30)
                connection.sendall(chunk(b'"a"\n'))
            connection.sendall(b"0\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 202 ")


class TestRedis:
    @pytest.mark.parametrize("fault", [Proxy.down, Proxy.hang], ids=["down", "hanging"])
    def test_jobs_are_taken_when_redis_is_away(self, settings: Settings, api_rows: Rows, fault: object) -> None:
        assert settings.redis_url is not None
        assert callable(fault)
        patience = 2.0
        with (
            proxied(settings.redis_url) as (proxy, url),
            running_api(settings.model_copy(update={"redis_url": url, "redis_timeout": patience})) as api,
        ):
            await_condition(lambda: api.client.get("/readyz").json()["redis"] == "ok", "Redis")
            fault(proxy)
            responses = [api.upload(b'"a"') for _ in range(3)]
            assert {response.status_code for response in responses} == {202}
            # A request that waits for Redis does so every time; one alone may be slow for reasons of the machine's.
            assert min(response.elapsed.total_seconds() for response in responses) < patience
            await_condition(lambda: api.client.get("/readyz").json()["notifications_lost"] > 0, "a lost notification")
            await_condition(lambda: api.client.get("/readyz").json()["redis"] == "unreachable", "the next look")
            proxy.up()
            await_condition(lambda: api.client.get("/readyz").json()["redis"] == "ok", "Redis' return")
            assert api.upload(b'"a"').status_code == 202
            await_condition(lambda: api.client.get("/readyz").json()["notifications_sent"] > 0, "a notification")
        assert len(api_rows.query("SELECT 1 FROM jobs WHERE state = 'in_progress'")) == 4

    @pytest.mark.parametrize(
        "broken",
        [{"min-replicas-to-write": "1"}, {"maxmemory": "1", "maxmemory-policy": "noeviction"}],
        ids=["NOREPLICAS", "OOM"],
    )
    def test_api_polls_and_says_so_when_redis_refuses_writes(
        self, api: Api, api_rows: Rows, broken: dict[str, str]
    ) -> None:
        assert api.settings.redis_url is not None

        def readiness() -> dict[str, object]:
            response = api.client.get("/readyz")
            assert response.status_code == 200
            return dict(response.json())

        with closing(redis.Redis.from_url(api.settings.redis_url)) as broker:
            before = {name: str(broker.config_get(name)[name]) for name in broken}
            for name, value in broken.items():
                broker.config_set(name, value)
            try:
                await_condition(lambda: readiness()["redis"] == "refuses writes", "what is wrong with Redis")
                assert readiness()["status"] == "degraded: polling"
                lost = readiness()["notifications_lost"]
                assert api.upload(b'"a"').status_code == 202
                await_condition(lambda: readiness()["notifications_lost"] != lost, "a lost notification")
            finally:
                for name, value in before.items():
                    broker.config_set(name, value)
        await_condition(lambda: readiness()["status"] == "ok", "Redis' return")
        sent = readiness()["notifications_sent"]
        assert api.upload(b'"a"').status_code == 202
        await_condition(lambda: readiness()["notifications_sent"] != sent, "a notification")

    def test_readyz_answers_in_time_when_redis_is_frozen(self, settings: Settings) -> None:
        assert settings.redis_url is not None
        with (
            proxied(settings.redis_url) as (proxy, url),
            running_api(settings.model_copy(update={"redis_url": url, "redis_timeout": 30.0})) as api,
        ):
            await_condition(lambda: api.client.get("/readyz").json()["redis"] == "ok", "Redis")
            proxy.hang()
            await_condition(lambda: api.client.get("/readyz").json()["redis"] == "unreachable", "the first look")
            began = time.monotonic()
            with ThreadPoolExecutor(8) as callers:
                states = list(callers.map(lambda _: httpx.get(f"{api.url}/readyz").json()["redis"], range(8)))
            assert set(states) == {"unreachable"}
            assert time.monotonic() - began < 20  # one after the other they would take 30 s each
            proxy.up()


class TestPostgres:
    def test_burst_of_long_polls_takes_few_transactions(self, settings: Settings, api_rows: Rows) -> None:
        job_id = api_rows.job(1)
        with running_api(settings.model_copy(update={"database_pool_size": 2})) as api, ExitStack() as stack:
            poll = (
                f"GET /v1/jobs/job_{job_id.hex}?wait=60 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                f"authorization: {api.client.headers['authorization']}\r\n\r\n"
            ).encode()
            checkouts: list[object] = []
            pool = api.server._app.state.services.transactions.database.sync_engine.pool
            sqlalchemy.event.listen(pool, "checkout", lambda *connection: checkouts.append(connection))
            began = time.monotonic()
            polls = [stack.enter_context(api.connect()) for _ in range(POLLS)]
            for connection in polls:
                connection.sendall(poll)
            await_condition(lambda: len(api.server.server_state.tasks) == POLLS, "running polls")
            api_rows.finish(job_id)
            for connection in polls:
                with connection.makefile("rb") as answer:
                    assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            # Three for each poll would be 1,800. The watch makes one look in each interval.
            looks = (time.monotonic() - began) / INTERVAL
            assert len(checkouts) < 100 + looks

    def test_routes_answer_503_while_postgres_is_away(self, settings: Settings, api_rows: Rows) -> None:
        assert settings.database_url is not None
        with (
            proxied(settings.database_url) as (proxy, url),
            running_api(settings.model_copy(update={"database_url": url})) as api,
        ):
            job = api.upload(b'"a"\n').json()
            proxy.down()
            for response in (
                api.client.get("/v1/jobs"),
                api.client.get(f"/v1/jobs/{job['id']}?wait=5"),
                api.client.get(f"/v1/jobs/{job['id']}/results"),
                api.client.post(f"/v1/jobs/{job['id']}/cancel"),
                api.client.get("/v1/models"),
                api.client.get("/readyz"),
                api.upload(b'"a"\n'),
                api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]}),
            ):
                assert error_of(response, 503)["code"] == "unavailable"
                assert response.headers["retry-after"] == "2"
            assert api.client.get("/healthz").status_code == 200
            proxy.up()
            assert api.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "in_progress"

    def test_routes_answer_503_when_postgres_is_frozen(self, settings: Settings, api_rows: Rows) -> None:
        assert settings.database_url is not None
        with proxied(settings.database_url) as (proxy, url):
            changes = {"database_url": url, "api_database_timeout": 0.5, "database_pool_size": 3}
            with running_api(settings.model_copy(update=changes)) as api, ThreadPoolExecutor(3) as callers:
                api.client.get("/v1/models")
                proxy.hang()
                answers = [
                    callers.submit(api.client.get, "/v1/jobs"),  # on a connection that was open before
                    callers.submit(api.client.get, "/v1/models"),  # on a new one
                    callers.submit(api.upload, b'"a"\n'),
                ]
                for answer in answers:
                    response = answer.result()
                    assert error_of(response, 503)["code"] in ("unavailable", "overloaded")
                    assert response.headers["retry-after"] == "2"
                proxy.up()
                await_condition(lambda: api.client.get("/v1/models").status_code == 200, "the end of the freeze")

    def test_upload_answers_503_when_postgres_goes_away_in_its_middle(self, settings: Settings, api_rows: Rows) -> None:
        assert settings.database_url is not None
        with (
            proxied(settings.database_url) as (proxy, url),
            running_api(settings.model_copy(update={"database_url": url})) as api,
        ):

            def body() -> Iterator[bytes]:
                yield b'"a"\n"b"\n"c"\n'
                await_condition(lambda: bool(api_rows.query("SELECT 1 FROM bodies")), "a stored group")
                proxy.down()
                yield b'"d"\n' * 10

            response = api.upload(body(), {"idempotency-key": "broken"})
            assert error_of(response, 503)["code"] == "unavailable"
            assert api_rows.query("SELECT state FROM jobs") == [("validating",)]
            proxy.up()
            assert api.client.get("/v1/jobs").json()["data"] == []
            # The API could not free its key; no session holds its lock any more.
            assert api.upload(b'"a"\n', {"idempotency-key": "broken"}).status_code == 202

    def test_upload_answers_507_when_the_disk_is_full(self, api: Api, api_rows: Rows) -> None:
        with raising(api_rows, sqlstate="53100"):
            error = error_of(api.upload(b'"a"\n'), 507)
            assert error["code"] == "insufficient_storage"
            assert api_rows.query("SELECT 1 FROM jobs") == []
        assert api.upload(b'"a"\n').status_code == 202

    def test_routes_name_the_remedy_when_the_database_has_no_tables(
        self, settings: Settings, empty_database_url: str
    ) -> None:
        with (
            served(settings.model_copy(update={"database_url": empty_database_url})) as (_, url),
            closing(anonymous(url, new_key())) as client,
        ):
            for path in ("/v1/jobs", "/readyz"):
                assert "pagemill migrate" in str(error_of(client.get(path), 503)["message"])

    def test_routes_name_the_reason_when_the_database_is_unsupported(
        self, settings: Settings, services: Services
    ) -> None:
        with (
            database_of(services, "LATIN1") as database_url,
            served(settings.model_copy(update={"database_url": database_url})) as (_, url),
            closing(anonymous(url, new_key())) as client,
        ):
            for path in ("/v1/jobs", "/readyz"):
                error = error_of(client.get(path), 503)
                assert error["code"] == "unavailable"
                assert "stores text as LATIN1; Pagemill needs UTF8" in str(error["message"])

    def test_result_stream_is_cut_visibly_when_its_rows_vanish(self, api: Api, api_rows: Rows) -> None:
        job_id = api_rows.job(600)
        api_rows.finish(job_id)
        api_rows.execute(
            "UPDATE results SET body = convert_to(json_build_object('response', repeat('x', 100000), 'error', null)"
            "::text, 'UTF8') WHERE job_id = :id",
            id=job_id,
        )
        with api.client.stream("GET", f"/v1/jobs/job_{job_id.hex}/results") as response:
            pieces = response.iter_raw()
            assert next(pieces).startswith(b'{"id":"req_')
            api_rows.execute("DELETE FROM results WHERE job_id = :id", id=job_id)
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)


class TestFaultsOfOurs:
    def test_unforeseen_error_leaks_nothing(self, api: Api, api_rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
        with raising(api_rows, sqlstate="P0001"), caplog.at_level(logging.DEBUG, "pagemill.api"):
            response = api.upload(f'"{CANARY}"\n'.encode(), {"idempotency-key": "ours"})
        error = error_of(response, 500)
        assert error["type"] == "server_error"
        assert CANARY not in response.text
        logged = [record.getMessage() for record in caplog.records]
        assert any(response.headers["x-request-id"] in line and "RaiseException" in line for line in logged)
        assert not any(CANARY in line for line in logged)
        assert api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == []
        assert api.upload(b'"a"', {"idempotency-key": "ours"}).status_code == 202


@contextmanager
def raising(rows: Rows, *, sqlstate: str) -> Iterator[None]:
    """Every line that is stored raises this error in Postgres, with what it holds in the message."""
    rows.execute(
        "CREATE OR REPLACE FUNCTION raise_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION '%', convert_from(NEW.body, 'UTF8') USING ERRCODE = '{sqlstate}'; END $$"
    )
    rows.execute("CREATE TRIGGER raise_it BEFORE INSERT ON bodies FOR EACH ROW EXECUTE FUNCTION raise_it()")
    try:
        yield
    finally:
        rows.execute("DROP TRIGGER raise_it ON bodies")
