"""Every step of a run on a GPU runs on the CPU with tiny sizes and the packages of a bare GPU machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.steps import STEPS
from tests.support.gpu_machine import gpu_machine_environment
from tests.support.paths import REPOSITORY

# One of each kind: the steps left out run the same modules.
ORDINARY = ("limits", "kernels", "tokens", "memcheck", "decode", "prefill", "small", "article", "vllm")


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


def test_dry_run_runs_its_steps_with_the_packages_of_a_gpu_machine(tmp_path: Path) -> None:
    lines = dry_run(tmp_path, f"--only={','.join(ORDINARY)}", f"--kit={tmp_path / 'absent'}")
    found = {line["step"]: line for line in lines}
    assert {name: line["status"] for name, line in found.items()} == dict.fromkeys(ORDINARY, "done") | {
        "vllm": "skipped"
    }
    assert "absent is missing" in found["vllm"]["reason"]
    assert found["limits"]["data"][0]["versions"]["sqlalchemy"] is None
    assert [one["same_tokens"] for one in found["tokens"]["data"]] == [1.0]
    assert found["kernels"]["data"][-1]["passed"] > 5
    assert any(one["what"].startswith("best of tiny") for one in found["decode"]["data"])
    assert any(one["what"] == "pagemill: profile" for one in found["article"]["data"])


@pytest.mark.slow
def test_dry_run_runs_every_step(tmp_path: Path) -> None:
    lines = dry_run(tmp_path, f"--kit={tmp_path / 'absent'}")
    assert [line["step"] for line in lines] == [step.name for step in STEPS]
    assert {line["step"] for line in lines if line["status"] != "done"} == {"vllm"}
