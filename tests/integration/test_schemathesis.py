"""Requests made up from `/openapi.json`: no answer is a 5xx or unlike what the document says.

`schemathesis` is no dependency: `pip install schemathesis` beside the project runs this.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cli.models import DEMO
from cli.stack import running_stack
from jobs.roles import Role
from jobs.settings import Settings
from tests.acceptance.openai_batches import rows
from tests.support.api_server import running_api
from tests.support.populated_service import PopulatedService, name_in_requests
from tests.support.rows import Rows

# Without a worker, live requests, questions to a tokenizer and tests of endpoints are 503 by design.
NEEDS_WORKERS = "completions$|/responses$|/test$|tokenize$|tokenizer_info$"
LEFT_OUT = f"{NEEDS_WORKERS}|^/v1/events$"  # which never ends
SUCCESSES = set(range(200, 300))
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


def reached(report: Path, document: dict[str, Any]) -> dict[str, set[int]]:
    """By operation with a parameter in its path: the statuses that answered."""
    found: dict[str, set[int]] = {}
    for path, methods in document["paths"].items():
        pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
        for method in methods:
            if "{" in path:
                found[f"{method.upper()} {path}"] = {
                    entry["response"]["status"]
                    for entry in json.loads(report.read_text())["log"]["entries"]
                    if entry["request"]["method"] == method.upper()
                    and pattern.fullmatch(urlsplit(entry["request"]["url"]).path)
                }
    return found


def test_answers_are_those_of_the_document(api_rows: Rows, api_settings: Settings, tmp_path: Path) -> None:
    """By an operator, who may do everything, to things that exist."""
    with running_api(api_settings) as api, api.client_of("default", Role.OPERATOR) as operator:
        document = api.client.get("/openapi.json").json()
        document["paths"] = {
            path: methods for path, methods in document["paths"].items() if not re.search(LEFT_OUT, path)
        }
        PopulatedService(operator, api_rows).put_ids(document)
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        report = tmp_path / "requests.har"
        run(
            str(tmp_path / "openapi.json"),
            operator.headers["authorization"].removeprefix("Bearer "),
            *("--url", api.url, "--max-examples", "8", "--report-har-path", str(report)),
            directory=tmp_path,
        )
    statuses = reached(report, document)
    assert len(statuses) > 30
    assert [operation for operation, answers in statuses.items() if not answers & SUCCESSES] == []


def test_answers_of_workers_are_those_of_the_document(tmp_path: Path) -> None:
    """Bodies name the model that is served: any other is a 404."""
    settings = Settings(data_dir=tmp_path / "data", port=0)
    with running_stack(settings, [DEMO]) as stack:
        document = httpx.get(f"{stack.base_url}/openapi.json", trust_env=False).json()
        name_in_requests(document, "model", [DEMO])
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        options = ("--url", stack.base_url, "--include-path-regex", NEEDS_WORKERS, "--max-examples", "40")
        run(str(tmp_path / "openapi.json"), stack.api_key, *options, directory=tmp_path)
        ((answered,),) = rows(stack, "SELECT count(*) FROM jobs WHERE is_live AND completed > 0")
        assert int(str(answered)) > 10  # the others were refused
