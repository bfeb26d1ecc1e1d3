"""Dry runs over HTTP, and the tokenizer that they ask: a worker's own server thread over real Valkey."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.settings import Settings
from tests.support.api_server import NDJSON, Api, error_of, running_api
from tests.support.rows import MODEL, Rows
from tests.unit.worker.generation.test_tokenizer_server import Tokenizer
from worker.generation.tokenizer_server import TokenizerServer


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings.model_copy(update={"stage_chunk_lines": 3, "max_lines": 2000})) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear()
    api_rows.execute("DELETE FROM workers")


@pytest.fixture
def worker(api: Api, api_rows: Rows) -> Iterator[None]:
    """A live worker's row, and the thread that tokenizes: a token a letter, "!" is none."""
    api_rows.worker()
    server = TokenizerServer(api.settings, tokenizer=lambda model: Tokenizer())
    server.start([MODEL])
    yield
    server.close()


def look(api: Api, prompts: list[Any], **options: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompts": prompts, **options}
    with api.client_of("default") as client:
        answer = client.post("/v1/jobs", params={"dry_run": "true"}, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_line_is_counted_where_they_are_few(api: Api, api_rows: Rows, worker: None) -> None:
    found = look(
        api,
        ["abc", {"prompt": [1, 2], "n": 3}, {"messages": [{"role": "user", "content": "abcd"}], "max_tokens": 5}],
        params={"max_tokens": 7},
    )
    assert found["lines"] == 3
    assert (found["error_count"], found["errors"]) == (0, [])
    assert (found["prompt_tokens"], found["prompt_tokens_basis"]) == (3 + 2 + 4, "every line was counted")
    assert found["max_completion_tokens"] == 7 + 3 * 7 + 5
    assert found["estimate"] is None
    assert found["live_workers"] == 1
    assert api_rows.query("SELECT * FROM jobs") == []


def test_many_texts_are_judged_by_a_sample(api: Api, worker: None) -> None:
    found = look(api, [{"prompt": "a" * (1 + line % 5)} for line in range(1000)])
    assert found["prompt_tokens"] == 3000  # a token a letter, whichever were drawn
    assert found["prompt_tokens_basis"] == "64 of 1000 texts counted"


def test_all_wrong_lines_are_listed_and_nothing_is_stored(api: Api, api_rows: Rows) -> None:
    lines = [
        b'{"prompt": "a", "custom_id": "x"}',
        b'{"prompt": ',
        b'{"prompt": "b", "custom_id": "x"}',
        b"",
        b'{"prompt": "c", "temperature": 99}',
        b'{"prompt": [1], "custom_id": "y"}',
    ]
    with api.client_of("default") as client:
        answer = client.post(
            "/v1/jobs", params={"model": "demo", "dry_run": "true"}, content=b"\n".join(lines), headers=NDJSON
        )
    found = answer.json()
    assert [(fault["line"], fault["code"], fault["param"]) for fault in found["errors"]] == [
        (2, "invalid_json", None),
        (3, "duplicate_custom_id", "custom_id"),
        (5, "invalid_request", "temperature"),
    ]
    assert (found["lines"], found["error_count"]) == (5, 3)
    assert found["prompt_tokens"] is None
    assert "no worker" in found["prompt_tokens_basis"]
    assert [api_rows.query(f"SELECT * FROM {table}") for table in ("jobs", "requests", "bodies")] == [[], [], []]


def test_errors_are_bounded(api: Api) -> None:
    found = look(api, [{"prompt": 5}] * 1500)
    assert (found["error_count"], len(found["errors"]), found["errors"][-1]["line"]) == (1500, 1000, 1000)


def test_stream_of_too_many_lines_keeps_what_was_found(api: Api) -> None:
    body = b'{"prompt": [1]}\n' * 2001
    with api.client_of("default") as client:
        answer = client.post("/v1/jobs", params={"model": "demo", "dry_run": "true"}, content=body, headers=NDJSON)
    assert answer.json()["lines"] == 2000
    assert [(fault["line"], fault["code"]) for fault in answer.json()["errors"]] == [(2001, "request_too_large")]


def test_time_is_estimated_by_the_models_own_minutes(api: Api, api_rows: Rows, worker: None) -> None:
    job = api_rows.job(4)
    api_rows.execute(
        """
        INSERT INTO job_minutes (job_id, minute, lines, failed, prompt_tokens, cached_tokens, completion_tokens)
        SELECT :job, date_trunc('minute', clock_timestamp()) - make_interval(mins => n), 10, 0, 500, 0, 100 * n
        FROM generate_series(1, 3) AS n
        """,
        job=job,
    )
    estimate = look(api, ["abcde"] * 10, params={"max_tokens": 50})["estimate"]
    # 10 + 11.67 + 13.33 tokens/s in turn, of answers of 20 tokens; 50 of the prompts and 10 answers of 20.
    assert estimate["seconds"] == pytest.approx(250 / (700 / 60), abs=0.06)
    assert estimate["low"] < estimate["seconds"] < estimate["high"]
    assert estimate["queued_seconds"] == pytest.approx(4 * 256 / (700 / 60), abs=0.06)
    assert estimate["basis"] == "11.7 tokens/s, the mean of the last 3 minutes with work"


@pytest.mark.parametrize(
    ("body", "query", "status", "param"),
    [
        ({"model": "nothing", "prompts": ["a"]}, {"dry_run": "true"}, 404, "model"),
        ({"model": "demo", "prompts": []}, {"dry_run": "true"}, 400, "prompts"),
        ({"model": "demo", "prompts": ["a"]}, {"dry_run": "perhaps"}, 400, "dry_run"),
        ({"model": "demo", "prompts": ["a"]}, {"dry_run": "true", "model": "demo"}, 400, None),
        ({"model": "demo", "prompts": ["a"], "nonsense": 1}, {"dry_run": "true"}, 400, "nonsense"),
    ],
)
def test_wrong_submission_is_refused_as_a_whole(
    api: Api, body: dict[str, Any], query: dict[str, str], status: int, param: str | None
) -> None:
    with api.client_of("default") as client:
        error = error_of(client.post("/v1/jobs", params=query, content=json.dumps(body), headers=JSON), status)
    assert error["param"] in (param, f"['{param}']")


JSON = {"content-type": "application/json"}


def test_false_is_an_ordinary_submission(api: Api) -> None:
    with api.client_of("default") as client:
        answer = client.post("/v1/jobs", params={"dry_run": "false"}, json={"model": "demo", "prompts": ["a"]})
        assert answer.json()["object"] == "job"
        streamed = client.post(
            "/v1/jobs", params={"dry_run": "false", "model": "demo"}, content=b'{"prompt":"a"}', headers=NDJSON
        )
        assert (streamed.status_code, streamed.json()["object"]) == (202, "job")
