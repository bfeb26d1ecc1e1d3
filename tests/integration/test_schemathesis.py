"""Requests made up from `/openapi.json`: no answer is a 5xx or unlike what the document says.

`schemathesis` is no dependency: `pip install schemathesis` beside the project runs this.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.settings import Settings
from tests.support.api_server import running_api

# Without a worker, live requests, questions to a tokenizer and tests of endpoints are 503 by design.
NEEDS_WORKERS = "completions$|/responses$|/test$|tokenize$|tokenizer_info$"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed"),
]


def test_answers_are_those_of_the_document(api_settings: Settings, tmp_path: Path) -> None:
    with running_api(api_settings) as api:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json"),
            *("--header", f"Authorization: {api.client.headers['authorization']}"),
            *("--phases", "examples,fuzzing", "--checks", CHECKS, "--exclude-path-regex", NEEDS_WORKERS),
            *("--max-examples", "8", "--seed", "1", "--continue-on-failure", "--no-color"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
