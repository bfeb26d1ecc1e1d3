"""`pagemill bench engine`, on a model of two layers."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from bench import ceilings
from bench.engine import measure
from bench.workload import workloads
from cli.main import app


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the ceilings are is not what is looked at here.
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "RUNS", 1)
    monkeypatch.setattr(ceilings, "MOST_COPIES", 1)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CHUNK", 8)


def test_measures_a_workload_and_its_parts() -> None:
    workload = workloads()["tiny"]
    found = measure(workload, "float32", is_profiled=True)
    assert found.requests == 6
    assert found.output_tokens == sum(request.max_tokens for request in workload.requests(0))
    assert found.profile is not None
    assert 0 < found.profile.seconds <= found.seconds
    assert found.ceilings is not None
    assert found.ceilings.compute > 0


def test_shows_the_demo_model() -> None:
    shown = CliRunner().invoke(app, ["bench", "engine", "--workload", "tiny", "--model", "demo", "--profile"])
    assert shown.exit_code == 0, shown.output
    assert "tokens/s" in shown.output
    for part in ("linears", "attention", "sampling", "scheduler", "text"):
        assert part in shown.output


@pytest.mark.parametrize("options", [["--workload", "W0"], ["--precision", "int3"], ["-m", "/no/such/model"]])
def test_says_what_it_cannot_do(options: list[str]) -> None:
    shown = CliRunner().invoke(app, ["bench", "engine", *options])
    assert shown.exit_code == 1
    assert "tokens/s" not in shown.output
