"""One attempt at a time, against real receivers on loopback."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from uuid import UUID

import httpcore
import orjson
import pytest
from standardwebhooks.webhooks import Webhook

from jobs.keys import new_webhook_secret
from jobs.queries.webhooks import DueDelivery
from tests.support.receivers import (
    RawReceiver,
    black_hole,
    dripping_body,
    dripping_head,
    endless_body,
    garbage,
    hang_up,
    raw_receiver,
    receiver,
)
from worker.courier import delivery as delivery_module
from worker.courier.addresses import AddressPolicy
from worker.courier.delivery import WebhookResponse, attempt, retry_after

LOCAL = AddressPolicy(allow_private=True)


def due(url: str, **changes: object) -> DueDelivery:
    delivery = DueDelivery(
        id=1,
        attempt=1,
        taken_at=datetime.now(UTC),
        endpoint_id=UUID(int=3),
        url=url,
        secrets=[new_webhook_secret()],
        batch_id=None,
        event_id=UUID(int=1),
        event_type="job.completed",
        event_created_at=datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
        job_id=UUID(int=2),
        job_state="completed",
        model="demo",
        metadata={"team": "Köln"},
        total=3,
        completed=2,
        failed=1,
        cancelled=0,
        expired=0,
    )
    return replace(delivery, **changes)  # type: ignore[arg-type]


def send(
    delivery: DueDelivery, policy: AddressPolicy = LOCAL, *, timeout: float = 60, tls: ssl.SSLContext | None = None
) -> WebhookResponse:
    return attempt(delivery, policy, timeout=timeout, tls=tls or httpcore.default_ssl_context())


def test_delivery_is_signed_so_that_the_receiver_can_verify() -> None:
    with receiver() as server:
        delivery = due(server.url + "?token=t")
        assert send(delivery) == WebhookResponse(204)
        (request,) = server.received
    event = Webhook(delivery.secrets[0]).verify(request.body, request.headers)
    assert event == {
        "id": "evt_00000000000000000000000000000001",
        "object": "event",
        "type": "job.completed",
        "created_at": 1767323045,
        "data": {
            "id": "job_00000000000000000000000000000002",
            "object": "job",
            "status": "completed",
            "model": "demo",
            "metadata": {"team": "Köln"},
            "request_counts": {"total": 3, "completed": 2, "failed": 1, "cancelled": 0, "expired": 0},
        },
    }
    assert request.path == "/hook?token=t"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] in server.url


def test_next_attempt_is_the_same_message_with_a_new_signature() -> None:
    with receiver() as server:
        delivery = due(server.url)
        send(delivery)
        send(replace(delivery, attempt=2, taken_at=delivery.taken_at + timedelta(seconds=60)))
        first, second = server.received
    assert first.body == second.body
    changed = {name for name in first.headers if first.headers[name] != second.headers[name]}
    assert changed == {"webhook-timestamp", "webhook-signature"}
    Webhook(delivery.secrets[0]).verify(second.body, second.headers)


def test_timestamp_is_utc_wherever_postgres_is() -> None:
    with receiver() as server:
        delivery = due(server.url, taken_at=datetime.now(timezone(timedelta(hours=9))))
        send(delivery)
        Webhook(delivery.secrets[0]).verify(server.received[0].body, server.received[0].headers)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_success(status: int) -> None:
    with receiver((status, {})) as server:
        assert send(due(server.url)) == WebhookResponse(status)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_other_status_is_a_failure_that_is_not_final(status: int) -> None:
    with receiver((status, {})) as server:
        assert send(due(server.url)) == WebhookResponse(status, f"the receiver answered {status}")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status: int) -> None:
    with receiver() as inside, receiver((status, {"location": inside.url})) as server:
        answer = send(due(server.url))
    assert (answer.status, answer.is_final) == (status, False)
    assert answer.error is not None
    assert inside.received == []


def test_status_410_is_final() -> None:
    with receiver((410, {})) as server:
        answer = send(due(server.url))
    assert (answer.status, answer.is_gone, answer.is_final) == (410, True, True)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_heard(status: int) -> None:
    with receiver((status, {"retry-after": "120"})) as server:
        assert send(due(server.url)).retry_after == 120


@pytest.mark.parametrize("name", ["Retry-After", "RETRY-AFTER"])
def test_retry_after_is_heard_in_any_case(name: str) -> None:
    with receiver((503, {name: "120"})) as server:
        assert send(due(server.url)).retry_after == 120


SLOPPY = [b"X Powered By: PHP", b"x: a\0b", b"no colon", b": no name", b"content-length: some"]


@pytest.mark.parametrize("header", SLOPPY)
@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["", "after 100"])
def test_status_decides_when_the_headers_cannot_be_parsed(header: bytes, interim: bytes) -> None:
    def reply(status: bytes) -> Callable[[RawReceiver, object], None]:
        head = interim + b"HTTP/1.1 " + status + b"\r\n" + header + b"\r\nRetry-After: 120\r\n\r\n"
        return lambda state, connection: connection.sendall(head)  # type: ignore[attr-defined]

    with raw_receiver(reply(b"200 OK")) as server:
        assert send(due(server.url)) == WebhookResponse(200)
    with raw_receiver(reply(b"503 Busy")) as server:
        assert send(due(server.url)) == WebhookResponse(503, "the receiver answered 503", retry_after=120)


def test_retry_after_is_ignored_with_another_status() -> None:
    with receiver((500, {"retry-after": "120"})) as server:
        assert send(due(server.url)).retry_after is None


NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (b"0", 0),
        (b" 90 ", 90),
        (b"86401", 86400),
        (b"9" * 4000, 86400),
        (b"-5", None),
        (b"soon", None),
        (b"", None),
        ("²".encode("latin-1"), None),
        (b"Thu, 01 Jan 2026 12:02:00 GMT", 120),
        (b"Thu, 01 Jan 2026 13:02:00 +0100", 120),
        (b"Thu, 01 Jan 2026 11:00:00 GMT", 0),
        (b"Fri, 01 Jan 2027 12:00:00 GMT", 86400),
        (b"Thu, 99 Jan 2026 12:02:00 GMT", None),
    ],
)
def test_retry_after_is_parsed_as_seconds_or_date(value: bytes | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize("hang", [black_hole, dripping_head])
def test_deadline_cuts_receivers_that_do_not_answer(hang: Callable[..., None]) -> None:
    with raw_receiver(hang) as server:
        began = time.monotonic()
        answer = send(due(server.url), timeout=0.5)
        took = time.monotonic() - began
    assert answer == WebhookResponse(error="no complete answer within 0.5 s")
    assert took > 0.4  # and not for ever: that is how long it would hang


def test_body_that_drips_is_cut_and_the_status_stands() -> None:
    with raw_receiver(dripping_body) as server:
        began = time.monotonic()
        assert send(due(server.url), timeout=2) == WebhookResponse(200)
        assert time.monotonic() - began > 1.9  # and not for the hours that its body would drip


def test_body_of_ten_gigabytes_is_capped() -> None:
    with raw_receiver(endless_body) as server:
        assert send(due(server.url), timeout=60) == WebhookResponse(200, answer=b"z" * 256)
        # What the two sockets' buffers hold was sent, not read.
        assert server.sent < 50_000_000


def test_deadline_covers_the_tls_handshake() -> None:
    with raw_receiver(black_hole) as server:
        answer = send(due(server.url.replace("http:", "https:")), timeout=0.5)
    assert answer == WebhookResponse(error="no complete answer within 0.5 s")


def test_tls_asks_for_the_host_by_its_name_not_by_its_address() -> None:
    with raw_receiver(hang_up) as server:
        url = server.url.replace("http://127.0.0.1", "https://named.example")
        answer = send(due(url), AddressPolicy(allow_private=True, resolver=lambda host, port: ["127.0.0.1"]))
    assert b"named.example" in server.head  # the server name in the clear, in TLS' first message
    assert answer.error is not None


def test_deadline_covers_name_resolution() -> None:
    asked_long_enough = threading.Event()

    def slow(host: str, port: int) -> list[str]:
        asked_long_enough.wait(10)  # an end that an attempt without a limit would wait for
        return ["127.0.0.1"]

    answer = send(due("http://slow.example"), AddressPolicy(allow_private=True, resolver=slow), timeout=0.2)
    asked_long_enough.set()
    assert answer == WebhookResponse(error="no answer from the name servers for slow.example")


def test_time_of_name_resolution_is_taken_off_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(delivery_module, "time", SimpleNamespace(monotonic=lambda: now))

    def slow(host: str, port: int) -> list[str]:
        nonlocal now
        now += 61
        return ["127.0.0.1"]

    with receiver() as server:
        url = server.url.replace("127.0.0.1", "slow.example")
        answer = send(due(url), AddressPolicy(allow_private=True, resolver=slow), timeout=60)
    assert answer == WebhookResponse(error="no complete answer within 60 s")
    assert server.received == []


@pytest.mark.parametrize("trouble", [garbage, hang_up])
def test_delivery_fails_when_the_receiver_does_not_speak_http(trouble: Callable[[RawReceiver, object], None]) -> None:
    with raw_receiver(trouble) as server:  # type: ignore[arg-type]
        answer = send(due(server.url))
    assert answer.status is None
    assert answer.error is not None
    assert not answer.is_final


def test_delivery_fails_when_no_server_listens() -> None:
    with receiver() as server:
        url = server.url
    answer = send(due(url))
    assert answer.error is not None
    assert answer.error.startswith("ConnectError")


def test_private_address_in_the_url_is_final() -> None:
    with receiver() as server:
        answer = send(due(server.url), AddressPolicy())
    assert answer == WebhookResponse(error="webhooks may not reach 127.0.0.1: loopback address", is_final=True)
    assert server.received == []


def test_name_that_resolves_to_a_private_address_is_refused_each_time() -> None:
    with receiver() as server:
        port = server.url.rpartition(":")[2]
        answers = ["93.184.215.14", "127.0.0.1"]
        policy = AddressPolicy(resolver=lambda host, port: answers)
        answer = send(due(f"http://rebound.example:{port}"), policy)
    assert answer == WebhookResponse(error="webhooks may not reach rebound.example (127.0.0.1): loopback address")
    assert server.received == []


def test_name_is_resolved_once_and_the_connection_goes_there() -> None:
    # DNS rebinding: another answer the second time. There is no second time.
    questions = []

    def rebinding(host: str, port: int) -> list[str]:
        questions.append(host)
        return ["127.0.0.1"] if len(questions) == 1 else ["169.254.169.254"]

    with receiver() as server:
        url = server.url.replace("127.0.0.1", "rebinding.example")
        assert send(due(url), AddressPolicy(allow_private=True, resolver=rebinding)) == WebhookResponse(204)
    assert questions == ["rebinding.example"]
    assert server.received[0].headers["host"].startswith("rebinding.example:")


def test_address_that_is_dead_leaves_time_for_the_next() -> None:
    with receiver() as server:
        url = server.url.replace("127.0.0.1", "two.example")
        policy = AddressPolicy(allow_private=True, resolver=lambda host, port: ["127.0.0.2", "127.0.0.1"])
        assert send(due(url), policy) == WebhookResponse(204)


@pytest.mark.parametrize(
    "url", ["http:///nohost", "http://:80/", "http://h:0/", "http://h:99999/", "ftp://h/", "http://h\u2028/", "nothing"]
)
def test_malformed_url_is_a_final_failure(url: str) -> None:
    answer = send(due(url))
    assert answer.is_final
    assert answer.error is not None
    assert answer.error.startswith("the URL is not valid")


def test_proxy_variables_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as proxy, receiver() as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert send(due(server.url)) == WebhookResponse(204)
    assert proxy.received == []


def test_credentials_in_the_url_are_sent_as_such() -> None:
    with receiver() as server:
        send(due(server.url.replace("http://", "http://user:p%40ss@")))
    assert server.received[0].headers["authorization"] == "Basic dXNlcjpwQHNz"
    assert "user" not in server.received[0].headers["host"]


def test_body_is_json_with_its_fields_in_order() -> None:
    with receiver() as server:
        send(due(server.url))
    body = server.received[0].body
    assert orjson.dumps(orjson.loads(body)) == body
