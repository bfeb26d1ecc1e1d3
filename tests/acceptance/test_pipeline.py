"""Jobs over HTTP through the whole service, with the demo model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import httpx
import jsonschema

from cli.client import Client, Submission
from cli.commands.webhook_receiver import webhook_receiver
from cli.models import DEMO
from cli.stack import RunningStack
from demo.tasks import mixed_holdout
from tests.support.oracle import check
from tests.support.processes import PATIENCE, await_condition

LINES = 600

SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["noun", "verb", None]},
    },
    "required": ["word", "size", "kind"],
    "additionalProperties": False,
}


def test_schemas_that_hold_and_one_that_cannot(stack: RunningStack) -> None:
    """Structured output beside free text; what is wrong with a schema is its line's error."""
    openai = {"type": "json_schema", "json_schema": {"name": "word", "schema": SCHEMA, "strict": True}}
    job = {
        "model": DEMO,
        "params": {"max_tokens": 120, "response_format": openai},
        "prompts": [
            *(f"{number} + 1 =" for number in range(20)),
            {
                "custom_id": "bad",
                "prompt": "a",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wyrd"}}},
            },
            {
                "custom_id": "costly",
                "prompt": "a",
                "structured_outputs": {"regex": "((a{0,100}){0,100}){0,100}b{9999}"},
            },
            {"custom_id": "regex", "prompt": "a", "structured_outputs": {"regex": "[a-c]{3}"}},
            {"custom_id": "choice", "prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}},
            {"custom_id": "grammar", "prompt": "a", "structured_outputs": {"grammar": 'start: "<" /[ab]{2}/ ">"'}},
            {"custom_id": "free", "prompt": "17 + 58 =", "response_format": {"type": "text"}, "temperature": 0},
        ],
    }
    with contextlib.closing(Client(stack.base_url, stack.api_key)) as client:
        headers = {"authorization": f"Bearer {stack.api_key}"}
        wrong = {**job, "params": {"response_format": {"type": "json_schema"}}}
        refused = httpx.post(f"{stack.base_url}/v1/jobs", json=wrong, headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "params.response_format"

        accepted = httpx.post(f"{stack.base_url}/v1/jobs", json=job, headers=headers)
        assert accepted.status_code == 202, accepted.text
        ended = list(client.follow(accepted.json()["id"]))[-1]
        assert ended["status"] == "completed"
        results = {line["custom_id"]: line for line in map(json.loads, client.results(ended["id"]))}
        check(stack.database_url)

    assert ended["request_counts"]["completed"] == 25 - 1 + (results["costly"]["response"]["status_code"] == 200)
    texts = {
        name: line["response"]["body"]["choices"][0]["text"]
        for name, line in results.items()
        if line["response"]["status_code"] == 200
    }
    for number in range(1, 21):
        assert results[f"request-{number}"]["response"]["body"]["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(texts[f"request-{number}"]), SCHEMA)
    assert re.fullmatch("[a-c]{3}", texts["regex"])
    assert texts["choice"] in ("yes", "no")
    assert re.fullmatch("<[ab]{2}>", texts["grammar"])
    assert texts["free"] == "75"
    response = results["bad"]["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["code"] == "invalid_grammar"
    assert "JSON schema" in response["body"]["error"]["message"]


def test_job_loses_and_repeats_nothing_when_its_worker_is_killed(stack: RunningStack, tmp_path: Path) -> None:
    problems = mixed_holdout(LINES)
    lines = tmp_path / "lines.jsonl"
    with lines.open("w") as file:
        for place in range(LINES):
            prompt = problems[place].prompt
            file.write(
                json.dumps({"custom_id": str(place), "prompt": prompt, "temperature": 0, "max_tokens": 12}) + "\n"
            )
    with (
        contextlib.closing(Client(stack.base_url, stack.api_key)) as client,
        webhook_receiver(client.webhook_secret()) as receiver,
    ):
        job = client.submit(lines, Submission(DEMO, webhook_url=receiver.url))
        await_condition(lambda: client.job(job["id"])["last_seq"] >= 100, "100 results", timeout=250)
        before = [json.loads(line) for line in client.results(job["id"])]
        os.kill(stack.pids()["worker"], signal.SIGKILL)
        await_condition(lambda: client.job(job["id"])["status"] == "completed", "the end of the job", timeout=300)
        results = [json.loads(line) for line in client.results(job["id"])]
        event = receiver.events.get(timeout=PATIENCE)
        check(stack.database_url)

    assert [result["seq"] for result in results] == list(range(1, LINES + 1))
    assert sorted(int(result["custom_id"]) for result in results) == list(range(LINES))
    # A reader that resumes never sees a line change or come twice.
    assert results[: len(before)] == before
    texts = {int(r["custom_id"]): r["response"]["body"]["choices"][0]["text"] for r in results}
    exact = sum(texts[place] == problems[place].answer for place in range(LINES))
    assert exact >= 0.99 * LINES
    assert event["type"] == "job.completed"
    assert event["data"]["id"] == job["id"]
