"""The command line's client against a service in trouble."""

from __future__ import annotations

import gzip
import io
import json
import socket
from contextlib import closing

import pytest

from cli.client import Client, ServiceError, ServiceUnavailable, Submission
from tests.unit.cli.scripted_service import UNAVAILABLE, Reply, ScriptedService, job

KEY = "pm_a-secret-of-a-tenant"


def result(seq: int) -> bytes:
    return json.dumps({"seq": seq}).encode() + b"\n"


def refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("key", "named"),
    [("", "is empty"), (KEY + "\r", r"'\r'"), (KEY + "\n", r"'\n'"), (KEY + "é", "'é'"), (KEY + " ", "' '")],
)
def test_unusable_key_is_named_without_being_shown(key: str, named: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        Client("http://127.0.0.1:1", key, key_origin="PAGEMILL_API_KEY")
    assert "PAGEMILL_API_KEY" in str(refusal.value)
    assert named in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port", "127.0.0.1:8100", "ftp://127.0.0.1", "http://me:se/cret@host", ""]
)
def test_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        Client(url, KEY)
    assert str(refusal.value) == "PAGEMILL_URL is not a URL such as http://127.0.0.1:8100."


def test_refused_connection_names_the_remedy_and_no_password() -> None:
    url = refused_url().replace("http://", "http://user:hidden@")
    with closing(Client(url, KEY)) as client, pytest.raises(ServiceUnavailable) as refusal:
        client.job("job_1")
    assert "pagemill up" in str(refusal.value)
    assert "hidden" not in str(refusal.value)


def test_unknown_key_is_traced_to_its_origin() -> None:
    reply = Reply.of({"error": {"message": "The key is not known.", "code": "invalid_api_key"}}, 401)
    said = r"The key is not known\. \(401 invalid_api_key\)\nThe key was taken from a file\."
    with (
        ScriptedService.serving([reply]) as service,
        closing(Client(service.url, KEY, key_origin="a file")) as client,
        pytest.raises(ServiceError, match=said),
    ):
        client.models()


def test_follow_survives_a_restart_and_says_so_once() -> None:
    replies = [Reply.of(job("in_progress", opened=1)), UNAVAILABLE, UNAVAILABLE, Reply.of(job())]
    told: list[str | None] = []
    with ScriptedService.serving(replies) as service, closing(Client(service.url, KEY)) as client:
        seen = list(client.follow("job_1", interval=0, on_outage=lambda outage: told.append(outage and str(outage))))
    assert [one["status"] for one in seen] == ["in_progress", "completed"]
    assert told == ["Postgres is away (503 unavailable)", None]


def test_follow_without_patience_raises_the_outage() -> None:
    with (
        ScriptedService.serving([UNAVAILABLE]) as service,
        closing(Client(service.url, KEY)) as client,
        pytest.raises(ServiceUnavailable),
    ):
        list(client.follow("job_1"))


def test_retry_after_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("cli.client.time.sleep", pauses.append)
    away = [Reply.of({}, 503, retry_after=value) for value in ("7", "Wed, 21 Oct 2026 07:28:00 GMT", "86400")]
    with ScriptedService.serving([*away, Reply.of(job())]) as service, closing(Client(service.url, KEY)) as client:
        list(client.follow("job_1", on_outage=lambda outage: None))
    assert pauses == [7.0, 2.0, 60.0]


def test_results_go_on_behind_the_last_whole_line() -> None:
    cut = result(1) + result(2) + b'{"seq": 3'
    replies = [Reply(cut, promised=1000), UNAVAILABLE, Reply(result(3) + result(4))]
    with ScriptedService.serving(replies) as service, closing(Client(service.url, KEY)) as client:
        lines = list(client.results("job_1", on_outage=lambda outage: None))
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3, 4]
    assert [asked.path.rpartition("?")[2] for asked in service.received] == ["after=0", "after=2", "after=2"]


def test_submission_streams_gzip_as_it_is() -> None:
    packed = gzip.compress(b'{"prompt": "a"}\n')
    with ScriptedService.serving([Reply.of(job())]) as service, closing(Client(service.url, KEY)) as client:
        for body in (packed, b'{"prompt": "a"}\n'):
            client.submit_stream(io.BytesIO(body), Submission("demo", options=[("stop", "a"), ("stop", "b")]))
    first, second = service.received
    assert (first.body, first.headers["Content-Encoding"]) == (packed, "gzip")
    assert "Content-Encoding" not in second.headers
    assert second.path == "/v1/jobs?model=demo&stop=a&stop=b"
