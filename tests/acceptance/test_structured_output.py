"""Structured output from REST to results: schemas that hold, and one that cannot, beside each other."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import httpx
import jsonschema
import pytest

from cli.client import Client
from cli.models import DEMO
from cli.stack import running_stack
from jobs.settings import Settings
from tests.oracle import check

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


@pytest.mark.timeout(300)
def test_a_job_with_schemas_and_a_bad_one(tmp_path: Path) -> None:
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
    with (
        running_stack(Settings(data_dir=tmp_path / "data", port=0), [DEMO]) as stack,
        contextlib.closing(Client(stack.base_url, stack.api_key)) as client,
    ):
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
