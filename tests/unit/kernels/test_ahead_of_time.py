"""Every kernel compiles for the GPUs that it is meant for, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


def compile_in_another_process(tmp_path: Path, *options: str) -> list[dict[str, object]]:
    # Here Triton interprets; there it compiles, and nothing that was compiled before counts.
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.ahead_of_time", *options],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [report for report in reports if not report["fits"]]
    assert not bad, bad
    assert done.returncode == 0, done.stderr
    return reports


@pytest.mark.timeout(600)
def test_kernels_compile_for_nvidia_and_amd(tmp_path: Path) -> None:
    reports = compile_in_another_process(tmp_path)
    assert {report["device"] for report in reports} == {"sm_80", "sm_90", "gfx942"}
    assert len({report["kernel"] for report in reports}) >= 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["Llama-3.1-8B", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_attention_kernels_take_the_recorded_resources(tmp_path: Path, model: str) -> None:
    """Registers, stack (spills), shared memory and tiles in flight, beside `resources_sm_90.json`.

    After an intended change, `resources` from `python -m tests.unit.kernels.ahead_of_time --models` go into the file.
    """
    record = json.loads(Path(__file__).with_name("resources_sm_90.json").read_text())
    if version("triton") != record["triton"]:
        pytest.skip(f"the record was made with triton {record['triton']}")
    reports = compile_in_another_process(tmp_path, "--models", model)
    found = {str(report["kernel"]): report["resources"] for report in reports}
    if not all(found.values()):
        pytest.skip("Triton has no cuobjdump here")
    assert found == {name: resources for name, resources in record["kernels"].items() if model in name}


def test_recorded_attention_kernels_neither_spill_nor_run_one_stage() -> None:
    recorded = json.loads(Path(__file__).with_name("resources_sm_90.json").read_text())["kernels"]
    assert {name for name, resources in recorded.items() if resources["stack"] > 0} == set()
    assert {name for name, resources in recorded.items() if resources["buffers"] < 2} == set()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_variant_of_the_tables_compiles(tmp_path: Path) -> None:
    assert len(compile_in_another_process(tmp_path, "--all")) > 100
