"""Arbitrary bytes never lead to a 5xx."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.requests import JobOptions, PromptLine
from jobs.settings import Settings
from tests.support.api_server import NDJSON, Api, running_api


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings.model_copy(update={"max_json_depth": 8})) as running:
        yield running


quick = settings(
    max_examples=30,
    deadline=None,  # a database and a network stand in between
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

text = st.text(st.characters(exclude_categories=()), max_size=10)  # lone surrogates too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(["demo", "a", "24h"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
lines = st.dictionaries(st.sampled_from([*PromptLine.model_fields, "other"]), values, max_size=4)
heads = st.dictionaries(st.sampled_from([*JobOptions.model_fields, "prompts", "other"]), values, max_size=5)


def is_fine(response: httpx.Response) -> None:
    assert response.status_code == 202 or 400 <= response.status_code < 500, (response.status_code, response.text)
    if response.status_code != 202:
        assert set(response.json()["error"]) - {"line"} == {"message", "type", "param", "code"}


@quick
@given(raw=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_submission_answers_no_5xx_to_any_bytes(api: Api, raw: bytes) -> None:
    is_fine(api.upload(raw))
    is_fine(api.client.post("/v1/jobs", content=raw, headers={"content-type": "application/json"}))


@quick
@given(document=st.lists(lines | values, max_size=3), head=heads)
def test_submission_answers_no_5xx_to_any_json(api: Api, document: list[object], head: dict[str, object]) -> None:
    # Python writes NaN and Infinity, and lone surrogates where they are: the API has to tell.
    is_fine(api.upload("\n".join(json.dumps(line) for line in document).encode()))
    is_fine(
        api.client.post(
            "/v1/jobs",
            content=json.dumps({"model": "demo", "prompts": document} | head).encode(),
            headers={"content-type": "application/json"},
        )
    )


@quick
@given(query=st.text(string.printable.replace("#", "").strip(), max_size=60), name=st.sampled_from(["", "model=demo&"]))
def test_routes_answer_no_5xx_to_any_query(api: Api, query: str, name: str) -> None:
    raw = (name + query).encode().replace(b" ", b"+")
    for path in ("jobs", "jobs/job_x", "jobs/job_x/results"):
        response = api.client.get(httpx.URL(f"{api.url}/v1/{path}", query=raw))
        assert response.status_code < 500
    is_fine(api.client.post(httpx.URL(f"{api.url}/v1/jobs", query=raw), content=b'"a"', headers=NDJSON))


@quick
@given(path=st.text(max_size=30))
def test_routes_answer_no_5xx_to_any_address(api: Api, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        url = httpx.URL(f"{api.url}/").copy_with(raw_path=f"/v1/jobs/{httpx.QueryParams({'x': path})}"[:200].encode())
        assert api.client.request(method, url).status_code < 500


@quick
@given(header=st.binary(max_size=40).map(lambda raw: raw.translate(None, b"\r\n\0").strip()))
def test_submission_answers_no_5xx_to_any_header(api: Api, header: bytes) -> None:
    for name in ("idempotency-key", "content-type", "content-encoding", "authorization"):
        try:
            response = api.client.post("/v1/jobs?model=demo", content=b'"a"', headers=[*NDJSON.items(), (name, header)])  # type: ignore[list-item]
        except httpx.LocalProtocolError:
            continue  # the client itself refuses to send it
        assert response.status_code < 500
