"""Tests of kernels and of the engine collect, and circumstances are told, with the packages of a bare GPU machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gpu_machine import gpu_machine_environment
from tests.support.paths import REPOSITORY

SERVICE_ONLY = ("celery", "fastapi", "llguidance", "orjson", "psycopg", "pydantic", "redis", "sqlalchemy")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return gpu_machine_environment(tmp_path_factory.mktemp("gpu-machine"))


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_gpu_environment_lacks_the_packages_of_the_service(environment: dict[str, str]) -> None:
    program = f"import importlib.util; print([name for name in {SERVICE_ONLY} if importlib.util.find_spec(name)])"
    assert run(environment, "-c", program).strip() == "[]"


def test_circumstances_have_none_for_absent_packages(environment: dict[str, str]) -> None:
    program = "import json; from bench.machine import circumstances; print(json.dumps(circumstances()))"
    told = json.loads(run(environment, "-c", program))
    assert {name for name, version in told["versions"].items() if version is None} == {
        "celery",
        "fastapi",
        "psycopg",
        "sqlalchemy",
    }
    assert told["versions"]["torch"]


def test_tests_of_kernels_and_engine_collect_on_a_gpu_machine(environment: dict[str, str], tmp_path: Path) -> None:
    told = run(
        environment, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
        "tests/unit/kernels", "tests/unit/engine", "tests/parity", "tests/unit/bench/gpu",
    )  # fmt: skip
    assert int(told.splitlines()[-1].split()[0]) > 1500
