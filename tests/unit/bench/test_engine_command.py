"""`python -m bench engine`, on a model of two layers."""

from __future__ import annotations

import sys

import pytest

from bench import ceilings
from bench.__main__ import main
from bench.engine import measure
from bench.workload import workloads


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the ceilings are is not what is looked at here.
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "RUNS", 1)
    monkeypatch.setattr(ceilings, "MOST_COPIES", 1)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CHUNK", 8)


def test_measure_returns_rates_profile_and_ceilings() -> None:
    workload = workloads()["tiny"]
    found = measure(workload, "float32", is_profiled=True)
    assert found.requests == 6
    assert found.output_tokens == sum(request.max_tokens for request in workload.requests(0))
    assert found.profile is not None
    assert 0 < found.profile.seconds <= found.seconds
    assert found.ceilings is not None
    assert found.ceilings.compute > 0


def _run(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """The exit code of `python -m bench engine` with these options."""
    monkeypatch.setattr(sys, "argv", ["bench", "engine", *options])
    with pytest.raises(SystemExit) as ending:
        main()
    return ending.value.code


def test_engine_command_shows_every_part_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--workload", "tiny", "--model", "demo", "--profile") == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    for part in ("linears", "attention", "sampling", "scheduler", "text"):
        assert part in shown


@pytest.mark.parametrize(
    ("options", "status", "complaint"),
    [
        (["--workload", "W0"], 2, "W0"),
        (["--precision", "int3"], 2, "int3"),
        (["--workload", "tiny", "-m", "/no/such/model"], 1, "/no/such/model"),
    ],
)
def test_engine_command_names_what_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    complaint: str,
) -> None:
    assert _run(monkeypatch, *options) == status
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert "tokens/s" not in shown.out
