"""The runner: what is skipped, what is kept, and that a step's end is the end of all that it started."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.first_run import OVERHEAD, Ended, Processes, appender, run_steps
from bench.gpu.reporting import MARK
from bench.gpu.steps import STEPS, Step
from bench.gpu.table import MOST_LINES, table


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(*limits_and_needs: tuple[float, float]) -> list[Step]:
    return [Step(f"s{number}", "", "", limit, needs) for number, (limit, needs) in enumerate(limits_and_needs)]


def run(made: list[Step], seconds: float, takes: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Lines, and the limit of each step that was launched; a step takes what `takes` says, up to its limit."""
    clock, limits, kept = Clock(), {}, []

    def launch(step: Step, limit: float) -> Ended:
        limits[step.name] = limit
        clock.now += min(limit, takes[step.name])
        return Ended(0 if takes[step.name] <= limit else None, "", "")

    lines = run_steps(made, seconds, launch, kept.append, clock)
    assert kept == lines
    return lines, limits


def test_step_is_skipped_when_it_no_longer_fits_and_a_later_one_runs() -> None:
    made = steps((50, 10), (50, 40), (50, 5))
    lines, limits = run(made, 60 + OVERHEAD, {"s0": 30, "s1": 1, "s2": 1})
    assert [line["status"] for line in lines] == ["done", "skipped", "done"]
    assert lines[1]["reason"] == "30 s left, it needs 40 s"
    assert limits == {"s0": 50, "s2": 30}


def test_step_ends_at_its_limit_or_at_that_of_the_run() -> None:
    lines, limits = run(steps((20, 10), (50, 10)), 50 + OVERHEAD, {"s0": 1000, "s1": 1000})
    assert [line["status"] for line in lines] == ["ended at its limit"] * 2
    assert limits == {"s0": 20, "s1": 30}
    assert [line["seconds"] for line in lines] == [20, 30]


def test_line_has_what_was_reported_before_a_failure() -> None:
    output = f'noise\n{MARK}{{"what": "a", "seconds": 1.0}}\n{MARK}{{"what": "cut o'

    def launch(step: Step, limit: float) -> Ended:
        return Ended(1, output, "Traceback\nIt broke")

    [line] = run_steps(steps((5, 1)), 60, launch, lambda line: None)
    assert (line["status"], line["rc"]) == ("failed", 1)
    assert line["data"] == [{"what": "a", "seconds": 1.0}]
    assert "| s0 | failed | 0 | It broke |" in table([line])


def test_line_is_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    append = appender(path)
    seen = []

    def launch(step: Step, limit: float) -> Ended:
        seen.append(path.read_text().count("\n") if path.exists() else 0)
        return Ended(0, "", "")

    run_steps(steps((5, 1), (5, 1), (5, 1)), 60, launch, append)
    assert seen == [0, 1, 2]
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == ["s0", "s1", "s2"]


def test_step_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f'print({MARK!r} + \'{{"what": "child", "pid": %d}}\' % child.pid, flush=True)\n'
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch = Processes(tmp_path / "log", is_dry=True, kit=tmp_path)
    step = Step("stubborn", "", "stubborn", 3, 1)
    [line] = run_steps([step], 60, launch, lambda line: None)
    assert line["status"] == "ended at its limit"
    [child] = line["data"]
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child['pid']}/stat").exists():
        state = Path(f"/proc/{child['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended, and not yet waited for
            break
        assert time.monotonic() < deadline
        os.sched_yield()
    assert '"what": "child"' in (tmp_path / "log").read_text()


def test_table_has_at_most_a_hundred_lines() -> None:
    data = [{"what": f"row {number}", "seconds": 1e-6} for number in range(300)]
    lines = [{"step": step.name, "status": "done", "seconds": 1.0, "data": data} for step in STEPS]
    text = table(lines)
    assert len(text.splitlines()) == MOST_LINES
    shown = MOST_LINES - len(STEPS) - 5 - 1
    assert text.endswith(f"… and {300 * len(STEPS) - shown} more in first_run.jsonl")


def test_steps_before_the_rivals_fit_into_a_call() -> None:
    ours = STEPS[: [step.name for step in STEPS].index("sequential")]
    assert sum(step.needs for step in STEPS) < 585
    assert all(step.needs <= step.limit for step in STEPS)
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.limit for step in ours) <= 640
