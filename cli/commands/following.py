"""Waiting for jobs: a live bar for each, and what their ends mean for a script."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cli.client import TERMINAL, Client, OnOutage
from cli.commands.terminal import err

COUNTS = ("completed", "failed", "cancelled", "expired", "open")
INTERVAL = 0.25  # seconds between two looks at a job
WINDOW = 30.0  # seconds of the past that the pace is taken from

OK = 0
LINES_FAILED = 1
INTERRUPTED = 130
"""Exit codes; 1 is also any error, and 2 a command that was typed wrongly. 130: Ctrl-C, as of a shell."""


def exit_code(jobs: Sequence[dict[str, Any]]) -> int:
    """OK where every job completed and no line of any failed."""
    is_good = all(job["status"] == "completed" and not job["request_counts"]["failed"] for job in jobs)
    return OK if is_good else LINES_FAILED


class Pace:
    """Lines and generated tokens a second over the last `WINDOW` seconds, and the time that is left at that."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def add(self, job: dict[str, Any], now: float) -> None:
        """Take in a job as it stood at `now`, in seconds of a monotonic clock."""
        self._seen.append((now, done(job), int(job.get("usage", {}).get("completion_tokens", 0))))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()

    def lines_per_second(self) -> float:
        return self._rate(1)

    def tokens_per_second(self) -> float:
        return self._rate(2)

    def seconds_left(self, opened: int) -> float:
        """Seconds for so many lines; infinite while none ends."""
        pace = self.lines_per_second()
        return opened / pace if pace else math.inf

    def _rate(self, column: int) -> float:
        first, last = self._seen[0], self._seen[-1]
        seconds = last[0] - first[0]
        return (last[column] - first[column]) / seconds if seconds > 0 else 0.0


def done(job: dict[str, Any]) -> int:
    """Lines that have ended, well or not."""
    return int(job["request_counts"]["total"] - job["request_counts"]["open"])


def describe(job: dict[str, Any], pace: Pace) -> str:
    """A job's pace in a line, e.g. `12 lines/s · 340 tokens/s · 2 failed · ETA 0:03:20`."""
    parts = [f"{pace.lines_per_second():,.0f} lines/s", f"{pace.tokens_per_second():,.0f} tokens/s"]
    if failed := job["request_counts"]["failed"]:
        parts.append(f"[red]{failed:,} failed[/red]")
    left = pace.seconds_left(job["request_counts"]["open"])
    if job["status"] not in TERMINAL and math.isfinite(left):
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return " · ".join(parts)


def follow_all(
    client: Client, jobs: Sequence[dict[str, Any]], *, on_outage: OnOutage | None = None
) -> list[dict[str, Any]]:
    """Show a bar for each job until all have ended; only their ends where there is no terminal to draw on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bars = [_Bar(progress, job) for job in jobs]
        interval = INTERVAL / max(1, len(jobs))
        looks = [client.follow(job["id"], interval=interval, on_outage=on_outage) for job in jobs]
        latest = list(jobs)
        running = dict(enumerate(looks))
        while running:
            for number, look in list(running.items()):
                seen = next(look, None)
                if seen is None:
                    del running[number]
                else:
                    latest[number] = seen
                    bars[number].show(seen)
    if not err.is_terminal:
        for job in latest:
            which = f"{job['id']} " if len(latest) > 1 else ""
            counts = ", ".join(f"{job['request_counts'][name]} {name}" for name in COUNTS)
            err.print(f"{which}{job['status']}: {counts}")
    return latest


class _Bar:
    def __init__(self, progress: Progress, job: dict[str, Any]) -> None:
        self._progress = progress
        self._pace = Pace()
        self._task: TaskID = progress.add_task(str(job["id"]), total=job["request_counts"]["total"], pace="")
        self.show(job)

    def show(self, job: dict[str, Any]) -> None:
        self._pace.add(job, time.monotonic())
        self._progress.update(
            self._task,
            completed=done(job),
            description=f"{job['id']} {job['status']}",
            pace=describe(job, self._pace),
        )
