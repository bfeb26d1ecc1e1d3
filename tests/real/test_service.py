"""`pagemill up --model smollm2`, and a chat with it by the official client."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from tests.real.conftest import packaged
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    packaged("smollm2")
    data_dir = tmp_path_factory.mktemp("service") / "data"
    command = [sys.executable, "-m", "cli", "up", "--model", "smollm2", "--data-dir", str(data_dir), "--port", "0"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            greeting = ""
            for line in process.stdout:
                greeting += line
                if line.startswith("Ctrl-C"):
                    break
            url = re.search(r"serves on (\S+)", greeting)
            key = re.search(r"key is +(\S+)", greeting)
            assert url, greeting
            assert key, greeting
            with openai.OpenAI(base_url=f"{url[1]}/v1", api_key=key[1], max_retries=0, timeout=PATIENCE) as made:
                yield made
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_chat_answers(client: openai.OpenAI) -> None:
    assert "smollm2" in [model.id for model in client.models.list()]
    made = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of Japan?"}],
        temperature=0,
        max_tokens=40,
    )
    assert made.choices[0].finish_reason == "stop"
    assert "Tokyo" in (made.choices[0].message.content or "")


def test_chat_gives_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sentiment": {"enum": ["positive", "negative"]}},
        "required": ["sentiment"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Classify the review: Great phone, battery lasts two days."}],
        response_format={"type": "json_schema", "json_schema": {"name": "review", "schema": schema}},
        temperature=0,
        max_tokens=40,
    )
    assert json.loads(made.choices[0].message.content or "") == {"sentiment": "positive"}
    assert made.usage is not None
    assert made.usage.completion_tokens > 5
