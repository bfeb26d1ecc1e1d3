"""submit, status, watch, results, cancel: through the API, like any client."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Table
from rich.text import Text

from cli.client import Client, ServiceError, ServiceUnavailable, Submission
from cli.commands.following import COUNTS, INTERRUPTED, exit_code, follow_all
from cli.commands.terminal import err, out, reports_errors, show_json
from cli.results_file import follow_results, last_seq, require_writable, write_file, write_stream
from jobs.settings import Settings


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
    as_json: bool = False,
) -> int:
    """Stream the file, "-" for standard input; with `wait`, follow the job and fail where a line did."""
    show = show_json if as_json else _show_id
    if output is not None:
        require_writable(output)  # not after hours of work
    with _client() as client, _opened(file) as lines:
        job = client.submit_stream(lines, Submission(model or only_model(client), webhook_url=webhook, options=options))
        if not wait:
            show(job)
            return 0
        job_id = job["id"]
        err.print(f"{job_id}: {job['request_counts']['total']} requests for {job['model']}")
        try:
            (job,) = follow_all(client, [job], on_outage=_say_outage)
            if output is not None:
                write_file(client, job_id, output, on_outage=_say_outage)
            if output is None or as_json:
                show(job)
        except KeyboardInterrupt:
            return _interrupted(job_id)
        except OSError:
            err.print(f"The results stay with the service: pagemill results {job_id} -o FILE", style="yellow")
            raise
    return exit_code([job])


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


def _interrupted(*job_ids: str) -> int:
    for job_id in job_ids:
        err.print(
            f"{job_id} goes on. `pagemill watch {job_id}` waits for it, `pagemill results {job_id}` shows what is "
            f"there, `pagemill cancel {job_id}` stops it.",
            style="yellow",
        )
    return INTERRUPTED


@reports_errors
def status(job_id: str, *, as_json: bool = False) -> int:
    with _client() as client:
        job = client.job(job_id)
    if as_json:
        show_json(job)
        return 0
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
def watch(job_ids: Sequence[str], *, as_json: bool = False) -> int:
    """Follow jobs to their ends, and fail where a job or a line of one did."""
    with _client() as client:
        try:
            jobs = follow_all(client, [client.job(job_id) for job_id in job_ids], on_outage=_say_outage)
        except KeyboardInterrupt:
            return _interrupted(*job_ids)
    if as_json:
        for job in jobs:
            show_json(job)
    return exit_code(jobs)


@reports_errors
def results(job_id: str, *, after: int, output: Path | None, follows: bool = False, resumes: bool = False) -> int:
    """With `follows` go on until the job has ended; with `resumes` append to `output` what it does not have yet."""
    with _client() as client:
        if resumes or (follows and output is not None):
            assert output is not None
            after = max(after, last_seq(output)) if resumes else after
            with output.open("ab" if resumes else "wb") as stream:
                return _stream(client, job_id, stream, after=after, follows=follows)
        if output is None:
            return _stream(client, job_id, sys.stdout.buffer, after=after, follows=follows)
        require_writable(output)
        write_file(client, job_id, output, after=after, on_outage=_say_outage)
    return 0


def _stream(client: Client, job_id: str, stream: BinaryIO, *, after: int, follows: bool) -> int:
    if not follows:
        write_stream(client, job_id, stream, after=after)
        return 0
    try:
        job = follow_results(client, job_id, stream, after=after, on_outage=_say_outage)
    except KeyboardInterrupt:
        return _interrupted(job_id)
    return exit_code([job])


@reports_errors
def retry(job_id: str, *, states: Sequence[str], fingerprint: str | None, wait: bool, as_json: bool = False) -> int:
    """Run lines of a job again as a new one; with `wait`, follow that to its end and fail where a line did."""
    wanted: dict[str, Any] = {}
    if states:
        wanted["state"] = list(states)
    if fingerprint is not None:
        wanted["fingerprint"] = fingerprint
    show = show_json if as_json else _show_id
    with _client() as client:
        job = client.retry(job_id, wanted)
        if not wait:
            show(job)
            return 0
        err.print(f"{job['id']}: {job['request_counts']['total']} lines of {job_id}")
        try:
            (job,) = follow_all(client, [job], on_outage=_say_outage)
        except KeyboardInterrupt:
            return _interrupted(job["id"])
    show(job)
    return exit_code([job])


@reports_errors
def cancel(job_id: str, *, as_json: bool = False) -> int:
    with _client() as client:
        job = client.cancel(job_id)
    if as_json:
        show_json(job)
    else:
        out.print(job["status"])
    return 0


def only_model(client: Client) -> str:
    """The model to use where none was named: the only one that is served."""
    names = [model["id"] for model in client.models()]
    if len(names) != 1:
        raise ServiceError(f"Name one with --model; this service knows: {', '.join(names) or 'none yet'}.")
    return str(names[0])


def _show_id(job: dict[str, Any]) -> None:
    out.print(job["id"])
