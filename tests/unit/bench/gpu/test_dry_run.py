"""Every step of a run on a GPU runs on the CPU with tiny sizes and the packages of a bare GPU machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.reporting import reports
from bench.gpu.steps import STEPS, engine
from tests.support.gpu_machine import gpu_machine_environment
from tests.support.paths import REPOSITORY

# Steps in one process, which imports torch once; `compile` and `engine` take longer than all of these.
TOGETHER = ("limits", "tokens", "memcheck", "decode", "shared", "prefill", "small", "case")
PROGRAM = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.argv[1:] = ["--dry-run", *["article"] * (name == "case")]
    importlib.import_module(f"bench.gpu.steps.{name}").main()
"""


def dry_run(directory: Path, *options: str) -> list[dict[str, Any]]:
    """The lines that were kept; every measurement in them must have succeeded."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.first_run", "--dry-run", "--seconds=3000", f"--out={directory}", *options],
        cwd=REPOSITORY,
        env=gpu_machine_environment(directory),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    begin, *lines = map(json.loads, (directory / "first_run.jsonl").read_text().splitlines())
    assert begin["is_dry"]
    assert [one for line in lines for one in line["data"] if "failure" in one] == []
    return lines


def test_dry_run_keeps_reports_with_the_packages_of_a_gpu_machine(tmp_path: Path) -> None:
    kernels, vllm = dry_run(tmp_path, "--only=kernels,vllm", f"--kit={tmp_path / 'absent'}")
    assert (kernels["step"], kernels["status"]) == ("kernels", "done")
    assert kernels["data"][-1]["passed"] > 5
    assert (vllm["step"], vllm["status"]) == ("vllm", "skipped")
    assert "absent is missing" in vllm["reason"]


def test_steps_report_with_the_packages_of_a_gpu_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(TOGETHER)],
        cwd=REPOSITORY,
        env=gpu_machine_environment(tmp_path) | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = reports(done.stdout)
    assert [one for one in found if "failure" in one] == []
    assert [one["versions"]["sqlalchemy"] for one in found if "versions" in one] == [None]
    assert [one["same_tokens"] for one in found if "same_tokens" in one] == [1.0]
    said = [one["what"] for one in found]
    assert "program ran" in said
    assert any(what.startswith("best of tiny") for what in said)
    assert any("usual stages" in what for what in said)
    assert "pagemill: profile" in said


def test_test_that_the_engine_step_runs_dry_exists() -> None:
    """The whole dry run is slow: a test that was renamed shows here."""
    for chosen in engine.DRY:
        file, name = chosen.split("::")
        assert f"def {name}(" in (REPOSITORY / file).read_text()


@pytest.mark.slow
def test_dry_run_runs_every_step(tmp_path: Path) -> None:
    lines = dry_run(tmp_path, f"--kit={tmp_path / 'absent'}")
    assert [line["step"] for line in lines] == [step.name for step in STEPS]
    assert {line["step"] for line in lines if line["status"] != "done"} == {"vllm"}
