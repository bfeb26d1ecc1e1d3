"""Anthropic's client, unmodified, on message batches; a worker's part is played on real rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.queries.settling import settle
from jobs.settings import Settings
from tests.support.api_server import Api, anonymous, error_of, new_key, running_api
from tests.support.processes import PATIENCE
from tests.support.rows import MODEL, Rows
from worker.generation.responses import Answer, Choice, broken, completed, refused

anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")

ASKED = {"model": "demo", "max_tokens": 16, "messages": [{"role": "user", "content": "17 + 58 ="}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM creations")


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    key = new_key(api.settings, "default")
    with anthropic.Anthropic(base_url=api.url, api_key=key, max_retries=0, timeout=PATIENCE) as made:
        yield made


def create(client: Any, *params: dict[str, Any], **options: Any) -> Any:
    requests = [{"custom_id": f"c{place}", "params": one} for place, one in enumerate(params)]
    return client.messages.batches.create(requests=requests, **options)


def stored(rows: Rows) -> list[dict[str, Any]]:
    return [json.loads(row.body) for row in rows.query("SELECT body FROM bodies ORDER BY line")]


def work(rows: Rows, *said: Choice | str) -> None:
    """Answer what waits, in the order of lines; a text is a refusal."""
    claimed = sorted(rows.claim(rows.worker()).requests, key=lambda request: request.line)
    outcomes = []
    for request, one in zip(claimed, said, strict=True):
        if isinstance(one, str):
            outcomes.append(broken(request, one) if one == "broke" else refused(request, one, code="invalid_request"))
        else:
            answer = Answer([one], prompt_tokens=9, cached_tokens=4, completion_tokens=2)
            outcomes.append(completed(request, MODEL.name, answer, is_chat=True))
    with rows.database.begin() as connection:
        settle(connection, outcomes)
    rows.check()


def test_batch_goes_all_the_way(client: Any, api: Api, api_rows: Rows) -> None:
    batch = create(client, ASKED, ASKED, ASKED, ASKED, ASKED)
    assert batch.id.startswith("msgbatch_")
    assert (batch.processing_status, batch.request_counts.processing, batch.results_url) == ("in_progress", 5, None)
    assert (batch.expires_at - batch.created_at).total_seconds() == pytest.approx(86400, abs=5)
    assert client.messages.batches.retrieve(batch.id) == batch
    with pytest.raises(anthropic.AnthropicError, match="No `results_url`"):
        client.messages.batches.results(batch.id)
    early = api.client.get(f"/v1/messages/batches/{batch.id}/results")
    assert error_of(early, 400)["code"] == "message_batch_not_ended"
    said = {"role": "assistant", "content": "75", "reasoning_content": "hm"}
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    work(
        api_rows,
        Choice(said, "stop"),
        Choice({"role": "assistant", "content": "7"}, "length"),
        Choice(calls, "tool_calls"),
        "too long",
        "broke",
    )
    ended = client.messages.batches.retrieve(batch.id)
    assert ended.processing_status == "ended"
    assert ended.ended_at is not None
    assert (ended.request_counts.succeeded, ended.request_counts.errored, ended.request_counts.processing) == (3, 2, 0)
    found = {line.custom_id: line.result for line in client.messages.batches.results(batch.id)}
    assert sorted(found) == ["c0", "c1", "c2", "c3", "c4"]
    message = found["c0"].message
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[1].text, message.stop_reason, message.role) == ("75", "end_turn", "assistant")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (5, 4, 2)
    assert found["c1"].message.stop_reason == "max_tokens"
    (call,) = found["c2"].message.content
    assert (call.type, call.id, call.name, call.input) == ("tool_use", "call_1", "weather", {"city": "Köln"})
    assert found["c2"].message.stop_reason == "tool_use"
    assert (found["c3"].error.error.type, found["c3"].error.error.message) == ("invalid_request_error", "too long")
    assert found["c4"].error.error.type == "api_error"
    assert client.messages.batches.delete(batch.id).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve(batch.id)


def test_params_become_a_line_of_a_job(client: Any, api_rows: Rows) -> None:
    tool = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}
    create(
        client,
        {
            **ASKED,
            "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
            "stop_sequences": ["\n"],
            "temperature": 0.5,
            "top_k": 3,
            "metadata": {"user_id": "u"},
            "tools": [tool],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "disabled"},
            "messages": [
                {"role": "user", "content": "How is it in Köln?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                        {"type": "text", "text": "And now?"},
                    ],
                },
            ],
        },
    )
    (line,) = stored(api_rows)
    assert line["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is it in Köln?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [CALL | {"function": {"name": "weather", "arguments": '{"city":"Köln"}'}}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        {"role": "user", "content": "And now?"},
    ]
    assert line["tools"][0]["function"] == {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object"},
    }
    assert {name: line[name] for name in ("max_tokens", "stop", "temperature", "top_k", "tool_choice")} == {
        "max_tokens": 16,
        "stop": ["\n"],
        "temperature": 0.5,
        "top_k": 3,
        "tool_choice": "required",
    }
    assert line["parallel_tool_calls"] is False
    assert line["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"nonsense": 1}, "nonsense"),
        ({"stream": True}, "stream"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ],
)
def test_wrong_params_are_that_requests_error(client: Any, api_rows: Rows, changes: dict[str, Any], named: str) -> None:
    batch = create(client, ASKED, {**ASKED, **changes})
    assert batch.request_counts.processing == 2
    bodies = stored(api_rows)
    assert "refused" not in bodies[0]
    assert bodies[1]["refused"]["param"] == named


@pytest.mark.parametrize(
    ("requests", "status", "param"),
    [
        ([], 400, "requests"),
        ([{"custom_id": "a", "params": ASKED, "more": 1}], 400, "requests[0].more"),
        ([{"custom_id": "a", "params": ASKED}, {"custom_id": "a", "params": ASKED}], 400, "custom_id"),
        ([{"custom_id": "a", "params": {**ASKED, "model": "nothing"}}], 404, "model"),
        (
            [{"custom_id": "a", "params": ASKED}, {"custom_id": "b", "params": {**ASKED, "model": "other"}}],
            400,
            "requests[1].params.model",
        ),
    ],
)
def test_wrong_batch_is_refused_whole_in_anthropics_shape(
    client: Any, api_rows: Rows, requests: list[Any], status: int, param: str
) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.batches.create(requests=requests)
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["param"] == param
    assert caught.value.body["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert caught.value.request_id
    assert api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == []


def test_cancelled_batch_keeps_nothing_running(client: Any, api_rows: Rows) -> None:
    batch = create(client, ASKED, ASKED)
    with pytest.raises(anthropic.ConflictError):
        client.messages.batches.delete(batch.id)
    cancelled = client.messages.batches.cancel(batch.id)
    assert cancelled.cancel_initiated_at is not None
    assert (cancelled.processing_status, cancelled.request_counts.canceled) == ("ended", 2)
    assert [line.result.type for line in client.messages.batches.results(batch.id)] == ["canceled", "canceled"]


def test_batches_are_listed_page_by_page(client: Any) -> None:
    made = [create(client, ASKED).id for _ in range(5)]
    assert [batch.id for batch in client.messages.batches.list(limit=2)] == made[::-1]


def test_another_tenants_batch_is_unknown(client: Any, api: Api) -> None:
    batch = create(client, ASKED)
    with api.client_of("another") as another:
        for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/results"), ("DELETE", "")):
            answer = another.request(method, f"/v1/messages/batches/{batch.id}{path}")
            assert error_of(answer, 404)["code"] == "message_batch_not_found", path
        assert another.get("/v1/messages/batches").json()["data"] == []


def test_key_comes_as_a_header_of_anthropics_too(api: Api) -> None:
    key = new_key(api.settings, "default")
    with anthropic.Anthropic(base_url=api.url, auth_token=key, api_key=None, max_retries=0) as bearer:
        assert list(bearer.messages.batches.list()) == []
    with anonymous(api.url) as older:
        older.headers["x-api-key"] = key  # as clients before 2.14 send it
        assert older.get("/v1/messages/batches").json()["data"] == []
        older.headers["x-api-key"] = "pm_wrong"
        assert error_of(older.get("/v1/messages/batches"), 401)["type"] == "authentication_error"
    stranger = anthropic.Anthropic(base_url=api.url, api_key="pm_wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.batches.list()


def test_create_that_is_sent_again_makes_one_batch(client: Any, api_rows: Rows) -> None:
    first, second = (create(client, ASKED, extra_headers={"idempotency-key": "k"}) for _ in range(2))
    assert first.id == second.id
    assert api_rows.query("SELECT count(*) AS n FROM jobs")[0].n == 1
