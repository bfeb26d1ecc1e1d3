"""`python3 -m bench.gpu.first_run`: every measurement in one call of limited length; see the package.

Each step is a process with a limit of its own and one line of `first_run.jsonl`, which is on the disk before the next
step starts. A step that no longer fits into the time is skipped, and the others still get their turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.gpu.reporting import reports
from bench.gpu.steps import STEPS, Step
from bench.gpu.table import table

ROOT = Path(__file__).parents[2]
STDERR_TAIL = 2_000
LOG_TAIL = 1 << 20
"""Characters of each step's output that `logs.txt` keeps: all steps together stay below 16 MiB."""

OVERHEAD = 2.0
"""Seconds for ending a step and writing its line."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a step's process ended."""

    rc: int | None
    """None: it was ended at its limit."""

    stdout: str
    stderr: str


Launch = Callable[[Step, float], Ended]
"""Runs a step for at most so many seconds."""


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    launch: Launch,
    keep: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Run what fits into `seconds`, in order, and `keep` a line for each step as soon as it is over."""
    deadline = clock() + seconds
    lines = []
    for step in steps:
        left = deadline - clock() - OVERHEAD
        if left < step.needs:
            line = _line(step, "skipped", reason=f"{max(left, 0):.0f} s left, it needs {step.needs:.0f} s")
        else:
            began = clock()
            limit = min(step.limit, left)
            ended = launch(step, limit)
            line = _ended_line(step, ended, clock() - began, limit)
        keep(line)
        lines.append(line)
    return lines


def _ended_line(step: Step, ended: Ended, seconds: float, limit: float) -> dict[str, Any]:
    found = reports(ended.stdout)
    reasons = [one["skip"] for one in found if "skip" in one]
    status = "ended at its limit" if ended.rc is None else "failed" if ended.rc else "skipped" if reasons else "done"
    return _line(
        step,
        status,
        rc=ended.rc,
        seconds=round(seconds, 2),
        limit=round(limit, 2),
        reason=reasons[0] if reasons else None,
        data=[one for one in found if "skip" not in one],
        stderr=ended.stderr[-STDERR_TAIL:] if status != "done" else "",
    )


def _line(step: Step, status: str, **values: Any) -> dict[str, Any]:
    return {"step": step.name, "title": step.title, "status": status, "data": [], **values}


class Processes:
    """Launches steps as processes of this interpreter, and appends what they print to a log."""

    def __init__(self, log: Path, *, is_dry: bool, kit: Path) -> None:
        self._log, self._is_dry, self._kit = log, is_dry, kit

    def __call__(self, step: Step, limit: float) -> Ended:
        command = [sys.executable, "-m", step.module, *step.names, "--kit", str(self._kit), "--seconds", f"{limit:.1f}"]
        # Files, not pipes: a grandchild that lives on holds a pipe open.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command + ["--dry-run"] * self._is_dry,
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
            rc: int | None
            try:
                rc = process.wait(limit)
            except subprocess.TimeoutExpired:
                rc = None
            _end_session(process)
            ended = Ended(rc, _content(out), _content(errors))
        with self._log.open("a") as log:
            for name, text in (("output", ended.stdout), ("errors", ended.stderr)):
                log.write(f"===== {step.name}: {name}, rc {rc}\n{text[-LOG_TAIL // 2 :]}\n")
        return ended

    def _environment(self) -> dict[str, str]:
        variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self._is_dry:
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        return os.environ | variables | {"PYTHONPATH": path}


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a step and everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _content(file: IO[str]) -> str:
    file.flush()
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def appender(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """Appends lines of JSON that are on the disk when the call returns."""

    def append(line: Mapping[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    return append


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    steps = [step for step in STEPS if options.only is None or step.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    append = appender(options.out / "first_run.jsonl")
    begin = {"begin": time.strftime("%FT%TZ", time.gmtime()), "is_dry": options.dry_run, "commit": options.commit}
    append(begin)

    def keep(line: dict[str, Any]) -> None:
        append(line)
        print(f"{line['step']}: {line['status']}, {line.get('seconds', 0):.0f} s", file=sys.stderr, flush=True)

    launch = Processes(options.out / "logs.txt", is_dry=options.dry_run, kit=options.kit)
    lines = run_steps(steps, options.seconds, launch, keep)
    print(table(lines))
    if options.dry_run and any(line["status"] not in ("done", "skipped") for line in lines):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu.first_run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=585.0, help="for all steps together")
    parser.add_argument("--out", type=Path, required=True, help="a directory; an earlier run's lines in it are kept")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(names)}")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu-kit", help="vLLM in parts, see docs/gpu.md")
    parser.add_argument("--commit", help="what is measured, where the machine has no history")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    return parser


if __name__ == "__main__":
    main()
