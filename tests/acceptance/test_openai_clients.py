"""The official OpenAI clients, unmodified, against the whole service with the demo model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from openai.types.webhooks import BatchCompletedWebhookEvent

from cli.models import DEMO
from cli.stack import RunningStack
from demo.tasks import mixed_holdout
from tests.acceptance.openai_batches import ADD, ASK, NAMED, NOW, ended, rows
from tests.acceptance.openai_responses import TestResponses
from tests.support.processes import PATIENCE, await_condition
from tests.support.proxies import Proxy
from tests.support.receivers import receiver

__all__ = ["TestResponses"]  # collected here, because it shares this module's stack

GREEDY = {"model": DEMO, "temperature": 0, "max_tokens": 12}


class TestLive:
    def test_answers_are_exact_whole_and_streamed(self, client: openai.OpenAI) -> None:
        for task in mixed_holdout(6, seed=3):
            whole = client.completions.create(prompt=task.prompt, **GREEDY)  # type: ignore[call-overload]
            assert (whole.choices[0].text, whole.choices[0].finish_reason) == (task.answer, "stop")
            chunks = list(
                client.completions.create(  # type: ignore[call-overload]
                    prompt=task.prompt, stream=True, stream_options={"include_usage": True}, **GREEDY
                )
            )
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == task.answer
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
            assert chunks[-1].usage == whole.usage
            assert chunks[-1].choices == []

    def test_chat_speaks_both_ways(self, client: openai.OpenAI) -> None:
        asked = {"messages": [{"role": "user", "content": "17 + 58 ="}], **GREEDY}
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        with client.chat.completions.stream(**asked) as stream:  # type: ignore[arg-type]
            final = stream.get_final_completion()
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.choices[0].message.role == "assistant"
        assert final.choices[0].finish_reason == whole.choices[0].finish_reason

    def test_choices_of_several_prompts_are_numbered_through(self, client: openai.OpenAI) -> None:
        prompts = ["17 + 58 =", "reverse stone ="]
        made = client.completions.create(prompt=prompts, n=2, **GREEDY)  # type: ignore[call-overload]
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in made.choices] == ["75", "75", "enots", "enots"]
        assert made.usage.prompt_tokens == sum(
            client.completions.create(prompt=prompt, **GREEDY).usage.prompt_tokens  # type: ignore[call-overload]
            for prompt in prompts
        )
        chunks = list(client.completions.create(prompt=prompts, n=2, stream=True, **GREEDY))  # type: ignore[call-overload]
        texts = [
            "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) for index in range(4)
        ]
        assert texts == ["75", "75", "enots", "enots"]

    def test_echoed_ids_have_log_probabilities_as_lm_eval_reads_them(self, client: openai.OpenAI) -> None:
        made = client.completions.create(
            model=DEMO, prompt=[[5, 6, 7, 8]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
        )
        logprobs = made.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
        assert logprobs.token_logprobs[0] is None
        assert None not in logprobs.token_logprobs[1:]
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())

    def test_streamed_log_probabilities_are_those_of_the_whole(self, client: openai.OpenAI) -> None:
        asked = {"prompt": "reverse stone =", "logprobs": 2, **GREEDY}
        whole = client.completions.create(**asked).choices[0].logprobs  # type: ignore[call-overload]
        chunks = client.completions.create(stream=True, **asked)  # type: ignore[call-overload]
        streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        assert [token for piece in streamed for token in piece.tokens] == whole.tokens
        assert [value for piece in streamed for value in piece.token_logprobs] == whole.token_logprobs

    def test_stop_string_is_never_shown(self, client: openai.OpenAI) -> None:
        chunks = client.completions.create(prompt="reverse stone =", stop="ots", stream=True, **GREEDY)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "en"

    def test_schema_holds_by_parse(self, client: openai.OpenAI) -> None:
        schema = {
            "type": "object",
            "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["size"],
            "additionalProperties": False,
        }
        made = client.chat.completions.create(
            model=DEMO,
            messages=[{"role": "user", "content": "1 + 1 ="}],
            max_tokens=40,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "size", "schema": {"x-guidance": {"whitespace_flexible": False}, **schema}},
            },
        )
        assert 0 <= json.loads(made.choices[0].message.content or "")["size"] <= 9

    @pytest.mark.parametrize(
        ("changes", "error", "param"),
        [
            ({"model": "nothing"}, openai.NotFoundError, "model"),
            ({"temperature": 11}, openai.BadRequestError, "temperature"),
            ({"n": 1000}, openai.BadRequestError, "n"),
            ({"suffix": "x"}, openai.BadRequestError, "suffix"),
            ({"prompt": []}, openai.BadRequestError, "prompt"),
            ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
        ],
    )
    @pytest.mark.parametrize("streams", [False, True])
    def test_wrong_request_is_refused_before_any_event(
        self,
        client: openai.OpenAI,
        changes: dict[str, object],
        error: type[openai.APIStatusError],
        param: str,
        streams: bool,
    ) -> None:
        with pytest.raises(error) as caught:
            client.completions.create(**{"prompt": "1 + 1 =", "stream": streams, **GREEDY, **changes})  # type: ignore[call-overload]
        assert caught.value.param == param

    def test_stream_options_without_a_stream_are_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(prompt="1 + 1 =", stream_options={"include_usage": True}, **GREEDY)  # type: ignore[call-overload]
        assert caught.value.param == "stream_options"

    def test_prompt_that_proves_too_long_keeps_its_status_in_a_stream(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(prompt="1 + " * 2000, stream=True, **GREEDY)  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"

    def test_image_part_is_a_clear_400(self, client: openai.OpenAI) -> None:
        part = {"type": "image_url", "image_url": {"url": "data:,"}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=[{"role": "user", "content": [part]}], **GREEDY)  # type: ignore[call-overload]
        assert (caught.value.code, caught.value.param) == ("unsupported_content", "messages[0].content[0].type")

    def test_caller_that_hangs_up_frees_the_engine(self, stack: RunningStack, client: openai.OpenAI) -> None:
        stream = client.completions.create(
            model=DEMO, prompt="1 + 1 =", max_tokens=100, stream=True, extra_body={"ignore_eos": True}, n=64
        )
        next(iter(stream))
        stream.close()
        await_condition(
            lambda: rows(stack, "SELECT count(*) FROM requests WHERE state IN ('running', 'pending')") == [(0,)],
            "end of the request whose caller hung up",
        )

    def test_live_requests_do_not_show_among_jobs(self, stack: RunningStack, client: openai.OpenAI) -> None:
        made = client.completions.create(prompt="1 + 1 =", **GREEDY)  # type: ignore[call-overload]
        with httpx.Client(headers={"authorization": f"Bearer {stack.api_key}"}, trust_env=False) as http:
            listed = http.get(f"{stack.base_url}/v1/jobs").json()["data"]
        assert f"job_{made.id.removeprefix('cmpl-')}" not in {job["id"] for job in listed}


class TestTokenize:
    @pytest.mark.parametrize(
        "asked",
        [
            {"messages": [{"role": "user", "content": "17 + 58 ="}]},
            {"messages": [{"role": "user", "content": "reverse st"}], "continue_final_message": True},
            {"messages": [{"role": "user", "content": "17 + 58 ="}], "add_special_tokens": True},
        ],
    )
    def test_conversation_has_the_tokens_that_it_runs_with(self, client: openai.OpenAI, asked: dict[str, Any]) -> None:
        found: Any = client.post("/tokenize", cast_to=object, body=asked)  # of the only model
        run: Any = client.post("/chat/completions", cast_to=object, body={**GREEDY, **asked})
        same = client.completions.create(prompt=found["tokens"], **GREEDY)  # type: ignore[call-overload]
        assert run["usage"]["prompt_tokens"] == found["count"]
        assert run["choices"][0]["message"]["content"] == same.choices[0].text


FLEX: Any = {"prompt": "reverse stone =", **GREEDY}
TIER: Any = {"service_tier": "flex"}


class TestFlex:
    def test_flex_waits_among_batches_and_answers(self, stack: RunningStack, client: openai.OpenAI) -> None:
        made = client.completions.create(**FLEX, extra_body=TIER)
        assert (made.choices[0].text, made.model_extra["service_tier"]) == ("enots", "flex")  # type: ignore[index]
        ((is_live,),) = rows(stack, f"SELECT is_live FROM jobs WHERE id = '{made.id.removeprefix('cmpl-')}'")
        assert is_live is False
        chunks = list(client.completions.create(stream=True, extra_body=TIER, **FLEX))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "enots"

    def test_flex_in_the_background_is_a_job(self, stack: RunningStack, client: openai.OpenAI) -> None:
        body = {**FLEX, **TIER, "background": True}
        job: Any = client.post("/completions", cast_to=object, body=body)
        headers = {"authorization": f"Bearer {stack.api_key}"}
        with httpx.Client(base_url=stack.base_url, headers=headers, trust_env=False) as http:
            ended = http.get(f"/v1/jobs/{job['id']}", params={"wait": 30}).json()
            assert ended["status"] == "completed"
            (line,) = http.get(f"/v1/jobs/{job['id']}/results").text.splitlines()
        assert json.loads(line)["response"]["body"]["choices"][0]["text"] == "enots"

    def test_flex_whose_caller_hangs_up_is_cancelled(self, stack: RunningStack) -> None:
        asked = json.dumps({**FLEX, **TIER, "max_tokens": 100, "n": 64, "ignore_eos": True})
        headers = {"authorization": f"Bearer {stack.api_key}", "content-type": "application/json"}
        open_requests = "SELECT count(*) FROM requests WHERE state IN ('running', 'pending')"
        with closing(HTTPConnection(stack.base_url.removeprefix("http://"))) as caller:
            caller.request("POST", "/v1/completions", asked, headers)
            await_condition(lambda: rows(stack, open_requests) == [(1,)], "the request")
        await_condition(lambda: rows(stack, open_requests) == [(0,)], "end of the request whose caller hung up")
        assert rows(stack, "SELECT state FROM jobs ORDER BY id DESC LIMIT 1") == [("cancelled",)]

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({"service_tier": "best"}, "service_tier"),
            ({"background": True}, "background"),
            ({"background": True, "service_tier": "flex", "stream": True}, "stream"),
        ],
    )
    def test_wrong_tier_is_named(self, client: openai.OpenAI, asked: dict[str, object], param: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/completions", cast_to=object, body={"prompt": "1 + 1 =", **GREEDY, **asked})
        assert caught.value.param == param


class TestRepeats:
    def test_lost_answer_is_given_again(self, stack: RunningStack, client: openai.OpenAI) -> None:
        """Sampled at random, so that an answer that was generated anew would differ."""
        asked: Any = {"model": DEMO, "prompt": "1 + 1 =", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        host, _, port = stack.base_url.removeprefix("http://").partition(":")
        proxy = Proxy((host, int(port)))
        retrying = client.with_options(base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=2)
        before = rows(stack, "SELECT count(*) FROM jobs WHERE is_live")[0][0]
        proxy.lose_answers(1)
        made = retrying.completions.create(**asked)
        streamed = retrying.completions.create(stream=True, extra_headers={"idempotency-key": "s"}, **asked)
        texts = ["".join(chunk.choices[0].text for chunk in streamed)]
        streamed = retrying.completions.create(stream=True, extra_headers={"idempotency-key": "s"}, **asked)
        texts.append("".join(chunk.choices[0].text for chunk in streamed))
        proxy.down()
        assert proxy.lost == 1
        assert texts[0] == texts[1] != ""
        after = rows(stack, "SELECT count(*) FROM jobs WHERE is_live")
        assert int(str(after[0][0])) == int(str(before)) + 2
        ((job_id,),) = rows(stack, "SELECT id FROM jobs WHERE is_live ORDER BY id DESC OFFSET 1 LIMIT 1")
        assert made.id == f"cmpl-{str(job_id).replace('-', '')}"


class TestTools:
    def test_forced_call_has_arguments_of_its_schema(self, client: openai.OpenAI) -> None:
        made = client.chat.completions.create(tools=[ADD, NOW], tool_choice=NAMED, **ASK)
        choice = made.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "add"
        assert 0 <= json.loads(call.function.arguments)["a"] <= 9

    def test_streamed_call_is_that_of_the_whole(self, client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(tools=[ADD], tool_choice=NAMED, **ASK).choices[0].message
        with client.chat.completions.stream(tools=[ADD], tool_choice=NAMED, n=2, **ASK) as stream:
            final = stream.get_final_completion()
        for choice in final.choices:
            (call,), (expected,) = choice.message.tool_calls or (), whole.tool_calls or ()
            assert expected.type == "function"
            assert (call.function.name, call.function.arguments) == ("add", expected.function.arguments)
            assert call.function.parsed_arguments == json.loads(expected.function.arguments)
            assert choice.finish_reason == "tool_calls"

    def test_calls_that_were_answered_are_replayed(self, client: openai.OpenAI) -> None:
        call = client.chat.completions.create(tools=[ADD], tool_choice=NAMED, **ASK).choices[0].message
        answer = {"role": "tool", "tool_call_id": (call.tool_calls or [])[0].id, "content": "2"}
        messages = [*ASK["messages"], call, answer]
        made = client.chat.completions.create(tools=[ADD], **{**ASK, "messages": messages})
        assert made.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(tools=[ADD], **{**ASK, "messages": messages[:2]})
        assert caught.value.param == "messages[1].tool_calls"

    def test_schema_that_does_not_compile_is_that_request_s_400(self, client: openai.OpenAI) -> None:
        broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
        for streams in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(tools=[broken], tool_choice="required", stream=streams, **ASK)
            assert caught.value.code == "invalid_grammar"

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({"tools": []}, "tools"),
            ({"tool_choice": "auto"}, "tool_choice"),
            ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice"),
            ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
            ({"tools": [NOW, NOW]}, "tools[1].function.name"),
            ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs"),
        ],
    )
    def test_wrong_tools_are_refused_by_name(self, client: openai.OpenAI, asked: dict[str, Any], param: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASK, **asked)
        assert caught.value.param == param


class TestBatches:
    def test_file_becomes_a_batch_and_its_output(self, client: openai.OpenAI) -> None:
        tasks = list(mixed_holdout(60, seed=5))
        lines = [
            {
                "custom_id": f"task-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": task.prompt, **GREEDY},
            }
            for number, task in enumerate(tasks)
        ]
        lines[7]["body"] = {"prompt": "1 + " * 2000, **GREEDY}
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        with receiver() as server:
            endpoint = client.webhooks.create(name="test", url=server.url, event_types=["batch.completed"])
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"kind": "test"}
            )
            (told,) = server.await_requests(1)
            client.webhooks.delete(endpoint.id)
        event = client.webhooks.unwrap(told.body.decode(), told.headers, secret=endpoint.signing_secret)
        assert isinstance(event, BatchCompletedWebhookEvent)
        assert event.data.id == batch.id
        done = client.batches.retrieve(batch.id)
        assert done.status == "completed"
        answers = {}
        for line in client.files.content(done.output_file_id or "").text.splitlines():
            document = json.loads(line)
            answers[document["custom_id"]] = document["response"]["body"]["choices"][0]["text"]
        expected = {f"task-{number}": task.answer for number, task in enumerate(tasks) if number != 7}
        assert answers == expected
        (error,) = client.files.content(done.error_file_id or "").text.splitlines()
        assert json.loads(error)["response"]["body"]["error"]["code"] == "context_length_exceeded"

    def test_lines_have_tools_and_schemas(self, client: openai.OpenAI) -> None:
        parameters = ADD["function"]["parameters"]
        schema = {"type": "json_schema", "json_schema": {"name": "add", "schema": parameters, "strict": True}}
        bodies = {
            "required": {**ASK, "tools": [ADD], "tool_choice": "required"},
            "named": {**ASK, "tools": [ADD, NOW], "tool_choice": NAMED},
            "schema": {**ASK, "response_format": schema},
            "unknown": {**ASK, "tools": [NOW], "tool_choice": NAMED},
        }
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            for name, body in bodies.items()
        ]
        done = ended(client, lines)
        assert done.status == "completed"
        content = client.files.content(done.output_file_id or "").text
        found = {line["custom_id"]: line["response"]["body"] for line in map(json.loads, content.splitlines())}
        assert found.keys() == bodies.keys() - {"unknown"}
        for name, body in found.items():
            # The client's own reading of the answer, as of a live one.
            (choice,) = ChatCompletion.model_validate(body).choices
            if name == "schema":
                assert choice.finish_reason == "stop"
                arguments = choice.message.content
            else:
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
                (call,) = choice.message.tool_calls or ()
                assert call.type == "function"
                assert call.function.name == "add"
                arguments = call.function.arguments
            assert 0 <= json.loads(arguments or "")["a"] <= 9
        (line,) = client.files.content(done.error_file_id or "").text.splitlines()
        refused = json.loads(line)
        assert (refused["custom_id"], refused["response"]["status_code"]) == ("unknown", 400)
        assert refused["response"]["body"]["error"]["param"] == "tool_choice"


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="there is no Node here")
def test_node_client_goes_the_same_way(stack: RunningStack, tmp_path: Path) -> None:
    install = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai@6.49.0"], cwd=tmp_path, capture_output=True
    )
    if install.returncode != 0:
        pytest.skip("npm cannot install the openai package here")
    script = Path(__file__).parent / "openai_client.mjs"
    shutil.copy(script, tmp_path / "client.mjs")
    done = subprocess.run(
        ["node", "client.mjs", f"{stack.base_url}/v1", stack.api_key],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "models": ["demo"],
        "text": "75",
        "streamed": "enots",
        "response": "75",
        "events": "75",
        "status": "completed",
        "answers": {"a": "75", "b": "enots"},
    }


def test_worker_that_dies_answers_with_a_retryable_error(stack: RunningStack, client: openai.OpenAI) -> None:
    """Never with half an answer that looks whole."""
    ((pid,),) = rows(stack, "SELECT pid FROM workers WHERE ended_at IS NULL")
    caught: list[BaseException] = []
    begun = threading.Event()

    def read() -> None:
        try:
            for _ in client.completions.create(
                model=DEMO, prompt="1 + 1 =", max_tokens=100, n=64, stream=True, extra_body={"ignore_eos": True}
            ):
                begun.set()
        except openai.APIError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    os.kill(int(str(pid)), signal.SIGSTOP)
    reader.start()
    await_condition(
        lambda: rows(stack, "SELECT count(*) FROM requests WHERE state = 'pending'") == [(1,)], "the request"
    )
    os.kill(int(str(pid)), signal.SIGCONT)
    assert begun.wait(PATIENCE)
    os.kill(int(str(pid)), signal.SIGKILL)
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert "Send the request again" in str(caught[0])
