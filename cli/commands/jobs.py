"""submit, status, watch, results, cancel: through the API, like any client."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.client import Client, OnOutage, ServiceError, ServiceUnavailable, Submission
from cli.commands.terminal import err, out, reports_errors
from cli.results_file import require_writable, write_file, write_stream
from jobs.settings import Settings

COUNTS = ("completed", "failed", "cancelled", "expired", "open")
INTERRUPTED = 130  # the exit code of a shell command that Ctrl-C ended


@contextlib.contextmanager
def _client() -> Iterator[Client]:
    with contextlib.closing(Client.from_settings(Settings())) as client:
        yield client


@reports_errors
def submit(
    file: Path,
    *,
    model: str | None,
    wait: bool,
    output: Path | None,
    webhook: str | None,
    options: Sequence[tuple[str, str]] = (),
) -> int:
    """Stream the file, "-" for standard input; with `wait`, follow the job and fail where a line did."""
    if output is not None:
        require_writable(output)  # not after hours of work
    with _client() as client, _opened(file) as lines:
        job = client.submit_stream(lines, Submission(model or only_model(client), webhook_url=webhook, options=options))
        if not wait:
            out.print(job["id"])
            return 0
        job_id = job["id"]
        err.print(f"{job_id}: {job['request_counts']['total']} requests for {job['model']}")
        try:
            job = follow(client, job, on_outage=_say_outage)
            if output is not None:
                write_file(client, job_id, output, on_outage=_say_outage)
            else:
                out.print(job_id)
        except KeyboardInterrupt:
            return _interrupted(job_id)
        except OSError:
            err.print(f"The results stay with the service: pagemill results {job_id} -o FILE", style="yellow")
            raise
    return 0 if job["status"] == "completed" and not job["request_counts"]["failed"] else 1


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    with file.open("rb") as lines:
        yield lines


def _say_outage(outage: ServiceUnavailable | None) -> None:
    if outage is None:
        err.print("The service answers again.", style="yellow")
    else:
        err.print(
            f"{outage}\nThe job is safe; waiting until the service answers. Ctrl-C ends the wait only.",
            style="yellow",
            markup=False,
        )


def _interrupted(job_id: str) -> int:
    err.print(
        f"{job_id} goes on. `pagemill watch {job_id}` waits for it, `pagemill results {job_id}` shows what is there, "
        f"`pagemill cancel {job_id}` stops it.",
        style="yellow",
    )
    return INTERRUPTED


@reports_errors
def status(job_id: str) -> int:
    with _client() as client:
        job = client.job(job_id)
    table = Table(show_header=False, box=None)
    for name in ("id", "status", "model", "priority", "metadata"):
        table.add_row(name, Text(str(job[name])))  # a caller's brackets are no markup
    for name in ("total", *COUNTS):
        table.add_row(name, str(job["request_counts"][name]))
    for name in ("prompt_tokens", "completion_tokens"):
        table.add_row(name, str(job["usage"][name]))
    for name in ("created_at", "expires_at", "ended_at"):
        table.add_row(name, "-" if job[name] is None else time.strftime("%F %T", time.localtime(job[name])))
    out.print(table)
    return 0


@reports_errors
def watch(job_id: str) -> int:
    with _client() as client:
        try:
            job = follow(client, client.job(job_id), on_outage=_say_outage)
        except KeyboardInterrupt:
            return _interrupted(job_id)
    return 0 if job["status"] == "completed" else 1


@reports_errors
def results(job_id: str, *, after: int, output: Path | None) -> int:
    with _client() as client:
        if output is None:
            write_stream(client, job_id, sys.stdout.buffer, after=after)
        else:
            require_writable(output)
            write_file(client, job_id, output, after=after, on_outage=_say_outage)
    return 0


@reports_errors
def cancel(job_id: str) -> int:
    with _client() as client:
        out.print(client.cancel(job_id)["status"])
    return 0


def only_model(client: Client) -> str:
    """The model to use where none was named: the only one that is served."""
    names = [model["id"] for model in client.models()]
    if len(names) != 1:
        raise ServiceError(f"Name one with --model; this service knows: {', '.join(names) or 'none yet'}.")
    return str(names[0])


def follow(client: Client, job: dict[str, Any], *, on_outage: OnOutage | None = None) -> dict[str, Any]:
    """Show a progress bar until the job has ended; only its end where there is no terminal to draw on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task("in_progress", total=job["request_counts"]["total"], rate="")
        began, before = time.monotonic(), _done(job)
        for seen in client.follow(job["id"], on_outage=on_outage):
            job = seen
            done, elapsed = _done(job), time.monotonic() - began
            rate = f"{(done - before) / elapsed:,.0f} requests/s" if elapsed > 0.5 else ""
            progress.update(bar, completed=done, description=job["status"], rate=rate)
    if not err.is_terminal:
        err.print(f"{job['status']}: " + ", ".join(f"{job['request_counts'][name]} {name}" for name in COUNTS))
    return job


def _done(job: dict[str, Any]) -> int:
    return int(job["request_counts"]["total"] - job["request_counts"]["open"])
