"""Batches as OpenAI's own client uses them: validation, counts, files of results, cancel and expiry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import openai
import pytest
from openai.types import Batch

from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome, settle
from jobs.settings import Settings
from jobs.states import RequestState
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import await_condition
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    changes = {"poll_interval": 0.05, "stage_chunk_lines": 7, "max_line_bytes": 4096}
    with running_api(api_settings.model_copy(update=changes)) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    key = api.client.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Claims take what waits, whichever test left it."""
    api_rows.execute("DELETE FROM batches")
    api_rows.clear_jobs()


def line(custom_id: object = "a", url: str = CHAT, method: str = "POST", **body: object) -> dict[str, object]:
    asked: dict[str, object] = {"model": "demo", "max_tokens": 4}
    asked |= {"messages": [{"role": "user", "content": "2 + 2 ="}]} if url == CHAT else {"prompt": "2 + 2 ="}
    return {"custom_id": custom_id, "method": method, "url": url, "body": asked | body}


def submit(client: openai.OpenAI, lines: Sequence[object], endpoint: str = CHAT, **options: object) -> Batch:
    content = b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
        **options,  # type: ignore[arg-type]
    )


def until(client: openai.OpenAI, batch: Batch, condition: Callable[[Batch], bool]) -> Batch:
    found = batch

    def look() -> bool:
        nonlocal found
        found = client.batches.retrieve(batch.id)
        return condition(found)

    await_condition(look, "state of the batch")
    return found


def work(rows: Rows, answers: Sequence[RequestState | None]) -> list[ClaimedRequest]:
    """Claim all that waits and settle it; None leaves a request running."""
    claimed = sorted(rows.claim(rows.worker(), limit=1000).requests, key=lambda request: request.line)
    with rows.database.begin() as connection:
        settle(
            connection,
            [
                Outcome(request.token, state, _answer(state), prompt_tokens=5, cached_tokens=3, completion_tokens=2)
                for request, state in zip(claimed, answers, strict=True)
                if state is not None
            ],
        )
    return claimed


def _answer(state: RequestState) -> bytes:
    status = 200 if state == RequestState.COMPLETED else 400
    body = {"object": "chat.completion"} if status == 200 else {"error": {"message": "too long"}}
    return json.dumps({"response": {"status_code": status, "request_id": "r", "body": body}, "error": None}).encode()


def contents(client: openai.OpenAI, file_id: str | None) -> list[dict[str, object]]:
    assert file_id is not None
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


class TestTheWayThrough:
    def test_batch_is_readable_at_once_and_completes(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line(str(number)) for number in range(20)], metadata={"run": "7"})
        assert client.batches.retrieve(made.id).id == made.id
        assert made.status == "validating"
        assert made.request_counts is not None
        running = until(client, made, lambda batch: batch.status == "in_progress")
        assert running.expires_at == made.created_at + 86400
        assert running.metadata == {"run": "7"}
        work(api_rows, [RequestState.COMPLETED] * 18 + [RequestState.FAILED] * 2)
        done = until(client, made, lambda batch: batch.status == "completed")
        assert done.request_counts is not None
        assert done.usage is not None
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 18, 2)
        assert (done.usage.input_tokens, done.usage.input_tokens_details.cached_tokens) == (100, 60)
        output, errors = contents(client, done.output_file_id), contents(client, done.error_file_id)
        assert [one["custom_id"] for one in output] == [str(number) for number in range(18)]
        assert [one["response"]["status_code"] for one in errors] == [400, 400]  # type: ignore[index]
        file = client.files.retrieve(done.output_file_id or "")
        assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(file.id).read()))
        assert client.batches.list(limit=1).data[0] == done

    def test_results_are_readable_while_the_batch_runs(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a"), line("b")])
        until(client, made, lambda batch: batch.status == "in_progress")
        work(api_rows, [RequestState.COMPLETED, None])
        running = client.batches.retrieve(made.id)
        assert running.status == "in_progress"
        assert [one["custom_id"] for one in contents(client, running.output_file_id)] == ["a"]
        with pytest.raises(openai.ConflictError):
            client.files.delete(running.output_file_id or "")

    def test_batch_without_a_good_line_completes_without_an_output(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a")])
        until(client, made, lambda batch: batch.status == "in_progress")
        work(api_rows, [RequestState.FAILED])
        done = until(client, made, lambda batch: batch.status == "completed")
        assert done.output_file_id is None
        assert len(contents(client, done.error_file_id)) == 1

    def test_cancelled_batch_keeps_what_was_finished(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a"), line("b"), line("c")])
        until(client, made, lambda batch: batch.status == "in_progress")
        work(api_rows, [RequestState.COMPLETED, None, None])
        client.batches.cancel(made.id)
        done = until(client, made, lambda batch: batch.status == "cancelled")
        assert [one["custom_id"] for one in contents(client, done.output_file_id)] == ["a"]
        errors = contents(client, done.error_file_id)
        assert [(one["response"], one["error"]["code"]) for one in errors] == [(None, "batch_cancelled")] * 2  # type: ignore[index]
        with pytest.raises(openai.ConflictError) as caught:
            client.batches.cancel(made.id)
        assert caught.value.response.headers["x-should-retry"] == "false"

    def test_expired_batch_lists_each_expired_line(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a"), line("b")])
        until(client, made, lambda batch: batch.status == "in_progress")
        work(api_rows, [RequestState.COMPLETED, None])
        api_rows.execute("UPDATE jobs SET expires_at = clock_timestamp()")
        api_rows.settle_due()
        done = until(client, made, lambda batch: batch.status == "expired")
        assert done.expired_at is not None
        assert [one["error"]["code"] for one in contents(client, done.error_file_id)] == ["batch_expired"]  # type: ignore[index]

    def test_legacy_lines_and_every_body_field_arrive(self, client: openai.OpenAI, api_rows: Rows) -> None:
        body = {"temperature": None, "stop": "", "logprobs": 3, "echo": True, "seed": -5, "logit_bias": {"5": -100}}
        made = submit(client, [line("a", LEGACY, **body), line("b", LEGACY, prompt=[1, 2], max_tokens=None)], LEGACY)
        until(client, made, lambda batch: batch.status == "in_progress")
        stored = [json.loads(request.body) for request in work(api_rows, [RequestState.COMPLETED] * 2)]
        assert stored == [
            {"prompt": "2 + 2 =", "max_tokens": 4, "logprobs": 3, "echo": True, "seed": -5, "logit_bias": {"5": -100}},
            {"prompt": [1, 2], "max_tokens": 16},
        ]

    def test_chat_parts_and_developers_become_plain_messages(self, client: openai.OpenAI, api_rows: Rows) -> None:
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
        made = submit(
            client,
            [line("a", messages=messages, max_tokens=None, max_completion_tokens=3, logprobs=True, top_logprobs=2)],
        )
        until(client, made, lambda batch: batch.status == "in_progress")
        stored = json.loads(work(api_rows, [RequestState.COMPLETED])[0].body)
        assert stored["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
        assert (stored["max_tokens"], stored["logprobs"]) == (3, 2)


class TestValidation:
    def test_invalid_batch_lists_every_fault_with_its_line(self, client: openai.OpenAI, api_rows: Rows) -> None:
        lines = [
            line("ok"),
            b"{nonsense",
            line("ok"),  # once more
            line("b", LEGACY),
            line("c", model="other"),
            line(None),
            line("d", method="GET"),
            *[line(f"more-{number}") for number in range(20)],
            line("ok"),  # in a later group
        ]
        failed = until(client, submit(client, lines), lambda batch: batch.status == "failed")
        assert failed.errors is not None
        found = {(error.line, error.code) for error in failed.errors.data or ()}
        assert found == {
            (2, "invalid_json_line"),
            (3, "duplicate_custom_id"),
            (4, "url_mismatch"),
            (5, "model_mismatch"),
            (6, "missing_required_parameter"),
            (7, "invalid_method"),
            (28, "duplicate_custom_id"),
        }
        assert failed.failed_at is not None
        assert api_rows.query("SELECT 1 FROM jobs WHERE deleted_at IS NULL") == []

    def test_invalid_batch_lists_at_most_a_thousand_faults(self, client: openai.OpenAI) -> None:
        failed = until(client, submit(client, [line("a"), *[b"[]"] * 1200]), lambda batch: batch.status == "failed")
        assert failed.errors is not None
        assert len(failed.errors.data or ()) == 1000

    @pytest.mark.parametrize(
        ("lines", "code"),
        [([], "empty_file"), ([line(model="nothing")], "model_not_found"), ([b"x" * 5000], "line_too_long")],
        ids=["empty", "unknown-model", "long-line"],
    )
    def test_file_that_cannot_run_fails_with_its_code(
        self, client: openai.OpenAI, lines: list[object], code: str
    ) -> None:
        failed = until(client, submit(client, lines), lambda batch: batch.status == "failed")
        assert failed.errors is not None
        assert [error.code for error in failed.errors.data or ()] == [code]

    def test_wrong_body_fails_its_line_with_400(self, client: openai.OpenAI, api_rows: Rows) -> None:
        lines = [line("a"), line("b", temperature=11), line("c", stream=True), line("d", nonsense=1)]
        made = submit(client, lines)
        until(client, made, lambda batch: batch.status == "in_progress")
        refused = [json.loads(request.body).get("refused") for request in work(api_rows, [None] * 4)]
        assert [one and one["param"] for one in refused] == [None, "temperature", "stream", "nonsense"]

    def test_invalid_lines_are_skipped_when_asked_for(self, client: openai.OpenAI, api_rows: Rows) -> None:
        lines = [line("a"), line("a"), b"nonsense", line("c", LEGACY)]
        made = submit(client, lines, extra_body={"on_error": "skip"})
        until(client, made, lambda batch: batch.status == "in_progress")
        claimed = work(api_rows, [None] * 4)
        codes = [json.loads(request.body).get("refused", {}).get("code") for request in claimed]
        assert codes == [None, "duplicate_custom_id", "invalid_json_line", "url_mismatch"]

    def test_input_cannot_be_deleted_before_it_was_read(self, api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a")])
        api_rows.execute(
            "UPDATE batches SET job_id = NULL, held_until = clock_timestamp() + interval '1 hour', holder = NULL"
        )
        with pytest.raises(openai.ConflictError, match="read by a batch"):
            client.files.delete(made.input_file_id)

    def test_validation_goes_on_where_a_process_died(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a")])
        until(client, made, lambda batch: batch.status == "in_progress")
        api_rows.execute(
            "UPDATE batches SET job_id = NULL, output_file_id = NULL, error_file_id = NULL, "
            "holder = :id, held_until = clock_timestamp() - interval '1 second'",
            id=api_rows.worker(),
        )
        assert until(client, made, lambda batch: batch.status == "in_progress").model == "demo"

    def test_batch_is_cancelled_while_it_is_validated(self, client: openai.OpenAI, api_rows: Rows) -> None:
        made = submit(client, [line("a")])
        until(client, made, lambda batch: batch.status == "in_progress")
        api_rows.execute(
            "UPDATE batches SET job_id = NULL, held_until = clock_timestamp() + interval '1 hour', holder = NULL"
        )
        assert client.batches.cancel(made.id).status == "cancelled"


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "soon"}, "completion_window"),
            ({"metadata": {"k": 5}}, "metadata.k"),
            ({"nonsense": 1}, "nonsense"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ],
    )
    def test_wrong_field_is_named(
        self, api: Api, client: openai.OpenAI, changes: dict[str, object], param: str
    ) -> None:
        file = client.files.create(file=b"x", purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changes
        error = error_of(api.client.post("/v1/batches", json=body), 400)
        assert str(error["param"]).strip("'[]") == param

    def test_file_of_another_purpose_or_tenant_is_refused(self, api: Api, client: openai.OpenAI) -> None:
        other = client.files.create(file=b"x", purpose="evals")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.batches.create(input_file_id=other.id, endpoint=CHAT, completion_window="24h")
        body = {"input_file_id": other.id, "endpoint": CHAT, "completion_window": "24h"}
        made = submit(client, [line("a")])
        with closing(api.client_of("stranger")) as stranger:
            error_of(stranger.post("/v1/batches", json=body), 404)
            for response in (stranger.get(f"/v1/batches/{made.id}"), stranger.post(f"/v1/batches/{made.id}/cancel")):
                error_of(response, 404)
            assert stranger.get("/v1/batches").json()["data"] == []
