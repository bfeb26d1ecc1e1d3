"""submit, status, watch, results, cancel: through the API, like any client."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.client import Client, ServiceError, Submission
from cli.commands.terminal import err, out, reports_errors
from jobs.settings import Settings

COUNTS = ("completed", "failed", "cancelled", "expired", "open")


@contextlib.contextmanager
def _client() -> Iterator[Client]:
    with contextlib.closing(Client.from_settings(Settings())) as client:
        yield client


@reports_errors
def submit(file: Path, *, model: str | None, wait: bool, output: Path | None, webhook: str | None) -> int:
    """Stream the file; with `wait`, follow the job and fail where a line did."""
    with _client() as client:
        job = client.submit(file, Submission(model or only_model(client), webhook_url=webhook))
        if not wait:
            out.print(job["id"])
            return 0
        err.print(f"{job['id']}: {job['request_counts']['total']} requests for {job['model']}")
        job = follow(client, job)
        if output is not None:
            _write_file(client, job["id"], 0, output)
        else:
            out.print(job["id"])
    return 0 if job["status"] == "completed" and not job["request_counts"]["failed"] else 1


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
        job = follow(client, client.job(job_id))
    return 0 if job["status"] == "completed" else 1


@reports_errors
def results(job_id: str, *, after: int, output: Path | None) -> int:
    with _client() as client:
        if output is None:
            _write_results(client, job_id, after, sys.stdout.buffer)
        else:
            _write_file(client, job_id, after, output)
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


def follow(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """A progress bar until the job has ended; a line a second where there is no terminal to draw on."""
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
        for seen in client.follow(job["id"]):
            job = seen
            done, elapsed = _done(job), time.monotonic() - began
            rate = f"{(done - before) / elapsed:,.0f} requests/s" if elapsed > 0.5 else ""
            progress.update(bar, completed=done, description=job["status"], rate=rate)
    if not err.is_terminal:
        err.print(f"{job['status']}: " + ", ".join(f"{job['request_counts'][name]} {name}" for name in COUNTS))
    return job


def _done(job: dict[str, Any]) -> int:
    return int(job["request_counts"]["total"] - job["request_counts"]["open"])


def _write_file(client: Client, job_id: str, after: int, path: Path) -> None:
    """What is there stays as it is unless every line came."""
    if path.exists() and not path.is_file():  # a pipe or a device holds nothing that could be lost
        with path.open("wb") as target:
            _write_results(client, job_id, after, target)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as target:
            _write_results(client, job_id, after, target)
        partial.replace(path.resolve())
    finally:
        partial.unlink(missing_ok=True)


def _write_results(client: Client, job_id: str, after: int, target: BinaryIO) -> None:
    for line in client.results(job_id, after=after):
        target.write(line + b"\n")
    target.flush()
