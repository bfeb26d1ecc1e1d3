"""Results as pages, in short and as CSV; one line with its request, result and where it ran."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest

from jobs.fingerprints import Failure, public
from jobs.line_timing import LineTiming
from jobs.queries import lines
from jobs.queries.claiming import ClaimedRequest, release
from jobs.queries.settling import settle
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.rows import MODEL, Rows, answered
from worker.generation.responses import Answer, Choice, completed, refused

TEXT = 'Grüße, "Welt"\n=1+1'


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(scope="module")
def job(api: Api, api_rows: Rows) -> str:
    """Twelve lines: every third fails, with two kinds of failure; the others are answered, two of them truncated."""
    api_rows.clear_jobs()
    sent = api.client.post(
        "/v1/jobs",
        json={
            "model": "demo",
            "params": {"max_tokens": 7},
            "prompts": [{"custom_id": f"c{line}", "prompt": f"p{line}"} for line in range(1, 13)],
        },
    )
    assert sent.status_code == 202, sent.text
    for request in sorted(api_rows.claim(api_rows.worker()).requests, key=lambda request: request.line):
        if request.line % 3 == 0:
            code = "context_length_exceeded" if request.line < 10 else "invalid_request"
            outcome = refused(request, f"The prompt has {request.line} tokens.", code=code)
        else:
            reason = "length" if request.line in (2, 11) else "stop"
            answer = Answer([Choice(TEXT, reason)], prompt_tokens=4, cached_tokens=1, completion_tokens=2)
            outcome = completed(request, MODEL.name, answer, is_chat=False)
        with api_rows.database.begin() as connection:
            settle(connection, [outcome])
    job_id: str = sent.json()["id"]
    return job_id


def page(api: Api, job: str, **query: object) -> list[dict[str, object]]:
    response = api.client.get(f"/v1/jobs/{job}/results", params={name: str(value) for name, value in query.items()})
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.content.split(b"\n") if line]


def seqs(api: Api, job: str, **query: object) -> list[object]:
    return [line["seq"] for line in page(api, job, **query)]


def test_results_before_come_newest_first(api: Api, job: str) -> None:
    assert seqs(api, job, before=2**31 - 1, limit=3) == [12, 11, 10]
    assert seqs(api, job, before=10, limit=100) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert seqs(api, job, before=1) == []


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ("failed", [3, 6, 9, 12]),
        ("completed", [1, 2, 4, 5, 7, 8, 10, 11]),
        ("truncated", [2, 11]),
        ("expired", []),
    ],
)
def test_results_of_a_state_are_those_lines(api: Api, job: str, state: str, found: list[int]) -> None:
    assert seqs(api, job, state=state) == found
    assert seqs(api, job, state=state, before=100) == found[::-1]
    paged: list[object] = []
    while some := seqs(api, job, state=state, limit=1, after=paged[-1] if paged else 0):
        paged += some
    assert paged == found


def test_results_of_a_kind_of_failure_are_those_lines(api: Api, job: str) -> None:
    kind = public(Failure.of("context_length_exceeded", "The prompt has 3 tokens.").fingerprint)
    assert seqs(api, job, fingerprint=kind) == [3, 6, 9]
    assert seqs(api, job, fingerprint="v1:00000000000000aa") == []


def test_completed_results_are_found_behind_many_others(api: Api, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_LOOKED_AT", 1)
    assert seqs(api, job, state="completed") == [1, 2, 4, 5, 7, 8, 10, 11]
    assert seqs(api, job, state="completed", before=12) == [11, 10, 8, 7, 5, 4, 2, 1]


def test_results_in_short_are_cut(api: Api, job: str) -> None:
    answered, failed = page(api, job, after=1, limit=2, preview=5)
    assert (answered["text"], answered["is_cut"], answered["finish_reason"]) == ("Grüße", True, "length")
    assert (answered["line"], answered["custom_id"], answered["completion_tokens"]) == (2, "c2", 2)
    assert (failed["text"], failed["error_code"], failed["error_message"]) == (
        None,
        "context_length_exceeded",
        "The p",
    )


def test_results_as_csv_hold_what_the_lines_hold(api: Api, job: str) -> None:
    response = api.client.get(f"/v1/jobs/{job}/results", params={"format": "csv"})
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    table = list(csv.DictReader(io.StringIO(response.content.decode(), newline="")))
    whole = page(api, job)
    assert [row["custom_id"] for row in table] == [line["custom_id"] for line in whole]
    assert [row["seq"] for row in table] == [str(line["seq"]) for line in whole]
    assert {row["text"] for row in table if row["state"] == "completed"} == {TEXT}
    assert table[2]["error_message"] == "The prompt has 3 tokens."


@pytest.mark.parametrize(
    "query",
    [{"after": 1, "before": 5}, {"state": "failed", "fingerprint": "v1:0000000000000001"}, {"fingerprint": "x"}],
)
def test_results_refuse_what_makes_no_sense(api: Api, job: str, query: dict[str, str]) -> None:
    error_of(api.client.get(f"/v1/jobs/{job}/results", params=query), 400)


def test_line_has_its_request_result_and_worker(api: Api, job: str, api_rows: Rows) -> None:
    line = api.client.get(f"/v1/jobs/{job}/lines/2").json()
    assert (line["line"], line["custom_id"], line["state"], line["seq"]) == (2, "c2", "completed", 2)
    assert (line["prompt"], line["messages"], line["params"]) == ("p2", None, {"max_tokens": 7})
    assert line["result"]["response"]["body"]["choices"][0]["text"] == TEXT
    (claim,) = line["claims"]
    worker = api_rows.query("SELECT worker_id FROM results WHERE seq = 2")[0].worker_id
    assert (claim["number"], claim["deaths"], claim["worker"], claim["host"]) == (1, 0, str(worker), "test")
    assert line["is_truncated"]
    assert line["timing"]["waited_ms"] >= 0
    assert line["timing"]["ran_ms"] >= 0


def test_line_that_waits_has_no_claim(api: Api, job: str, api_rows: Rows) -> None:
    sent = api.client.post(
        "/v1/jobs", json={"model": "demo", "prompts": [{"messages": [{"role": "user", "content": "hi"}]}]}
    )
    line = api.client.get(f"/v1/jobs/{sent.json()['id']}/lines/1").json()
    assert (line["state"], line["claims"], line["result"], line["timing"]["ran_ms"]) == ("pending", [], None, None)
    assert line["messages"] == [{"role": "user", "content": "hi"}]


def test_line_that_a_job_has_not_is_unknown(api: Api, job: str) -> None:
    assert error_of(api.client.get(f"/v1/jobs/{job}/lines/13"), 404)["code"] == "line_not_found"


def test_lines_of_another_tenant_are_unknown(api: Api, job: str) -> None:
    with api.client_of("another") as stranger:
        for path in ("lines/2", "results?state=failed", "results?preview=9"):
            assert error_of(stranger.get(f"/v1/jobs/{job}/{path}"), 404)["code"] == "job_not_found"


def settle_what_waits(rows: Rows) -> None:
    """What a test before left is not claimed by the next one."""
    rows.settle(rows.claim(rows.worker()).requests)


def test_line_says_where_its_time_went(api: Api, job: str, api_rows: Rows) -> None:
    settle_what_waits(api_rows)
    sent = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["x", "y"]}).json()["id"]
    timed, untimed = sorted(api_rows.claim(api_rows.worker()).requests, key=lambda request: request.line)
    timing = LineTiming(0.5, 0.25, 1.0, 2.0, 0.125, 3, ended=time.monotonic() - 60)
    with api_rows.database.begin() as connection:
        settle(connection, [replace(answered(timed), timing=timing), answered(untimed)])
    first, second = (api.client.get(f"/v1/jobs/{sent}/lines/{line}").json()["timing"] for line in (1, 2))
    parts = {"engine_ms": 500, "grammar_ms": 250, "prefill_ms": 1000, "decode_ms": 2000, "preempted_ms": 125}
    assert {name: first[name] for name in parts} == parts
    assert first["preemptions"] == 3
    assert first["write_ms"] >= 60_000
    assert {name: second[name] for name in first if name not in ("waited_ms", "ran_ms")} == dict.fromkeys(
        [*parts, "write_ms", "preemptions"]
    )


def test_earlier_claims_say_how_they_ended(api: Api, job: str, api_rows: Rows) -> None:
    settle_what_waits(api_rows)
    sent = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["x"]}).json()["id"]
    held: list[UUID] = []

    def claimed() -> ClaimedRequest:
        held.append(api_rows.worker())
        (request,) = api_rows.claim(held[-1]).requests
        return request

    def claims() -> list[tuple[object, ...]]:
        shown = api.client.get(f"/v1/jobs/{sent}/lines/1").json()["claims"]
        for claim, worker_id in zip(shown, held, strict=True):
            assert (claim["worker"], claim["host"]) == (str(worker_id), "test")
            assert (claim["ended_at"] is None) == (claim["end"] is None)
        return [(claim["number"], claim["deaths"], claim["end"], claim["is_alone"]) for claim in shown]

    with api_rows.database.begin() as connection:
        assert release(connection, [claimed().token]) == 1
    assert claims() == [(1, 0, "given_back", False)]
    for _ in range(2):
        claimed()
        api_rows.lapse(held[-1])
        assert api_rows.reap() is not None
    last = claimed()
    expected = [(1, 0, "given_back", False), (2, 1, "lost", False), (3, 2, "lost", False), (4, 2, None, True)]
    assert claims() == expected
    api_rows.settle([last])
    assert claims() == expected


def test_claim_after_a_death_is_counted(api: Api, job: str, api_rows: Rows) -> None:
    sent = api.client.post("/v1/jobs", json={"model": "demo", "prompts": ["x"]}).json()["id"]
    api_rows.execute("UPDATE requests SET deaths = 1, epoch = 1 WHERE state = 'pending'")
    claimed = api_rows.claim(api_rows.worker()).requests
    api_rows.settle(claimed)
    (claim,) = api.client.get(f"/v1/jobs/{sent}/lines/1").json()["claims"]
    assert (claim["number"], claim["deaths"]) == (2, 1)
