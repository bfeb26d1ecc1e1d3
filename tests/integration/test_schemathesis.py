"""Requests made up from `/openapi.json`: no answer is a 5xx or unlike what the document says.

`schemathesis` is no dependency: `pip install schemathesis` beside the project runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from cli.models import DEMO
from cli.stack import running_stack
from jobs.settings import Settings
from tests.acceptance.openai_batches import rows
from tests.support.api_server import running_api

# Without a worker, live requests, questions to a tokenizer and tests of endpoints are 503 by design.
NEEDS_WORKERS = "completions$|/responses$|/test$|tokenize$|tokenizer_info$"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed"),
]


def run(document: str, key: str, *options: str, directory: Path) -> None:
    """Hold the answers to made-up requests against the document, which is a file or an address."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", document, "--header", f"Authorization: Bearer {key}"),
        *("--phases", "examples,fuzzing", "--checks", CHECKS, "--seed", "1", "--continue-on-failure", "--no-color"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr


def test_answers_are_those_of_the_document(api_settings: Settings, tmp_path: Path) -> None:
    with running_api(api_settings) as api:
        key = api.client.headers["authorization"].removeprefix("Bearer ")
        options = ("--exclude-path-regex", NEEDS_WORKERS, "--max-examples", "8")
        run(f"{api.url}/openapi.json", key, *options, directory=tmp_path)


def test_answers_of_workers_are_those_of_the_document(tmp_path: Path) -> None:
    """Bodies name the model that is served: any other is a 404."""
    settings = Settings(data_dir=tmp_path / "data", port=0)
    with running_stack(settings, [DEMO]) as stack:
        document = httpx.get(f"{stack.base_url}/openapi.json", trust_env=False).json()
        for operations in document["paths"].values():
            for operation in operations.values():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                for schema in [content.get("schema", {}), *content.get("schema", {}).get("anyOf", ())]:
                    if "model" in schema.get("properties", {}):
                        schema["properties"]["model"] = {"enum": [DEMO]}
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        options = ("--url", stack.base_url, "--include-path-regex", NEEDS_WORKERS, "--max-examples", "40")
        run(str(tmp_path / "openapi.json"), stack.api_key, *options, directory=tmp_path)
        ((answered,),) = rows(stack, "SELECT count(*) FROM jobs WHERE is_live AND completed > 0")
        assert int(str(answered)) > 10  # the others were refused
