"""A job's results in a file: replaced whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cli.client import Client, OnOutage, ServiceError

INTERVAL = 0.5  # seconds between two looks for new results
TAIL = 1 << 16  # bytes that are read at once of a file's end


def require_writable(path: Path) -> None:
    """Raise OSError where results could not be written to `path`."""
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not target.exists() or target.is_file():
        with _replacement(target):
            pass
    elif not os.access(target, os.W_OK):  # opening a pipe would wait for its reader
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_file(client: Client, job_id: str, path: Path, *, after: int = 0, on_outage: OnOutage | None = None) -> None:
    """Write the results with a `seq` above `after`. What is there stays as it is unless every line came."""
    target = path.resolve()
    if target.exists() and not target.is_file():  # a pipe or a device holds nothing that could be lost
        with target.open("wb") as stream:
            write_stream(client, job_id, stream, after=after, on_outage=on_outage)
        return
    with _replacement(target) as partial:
        with partial.open("wb") as stream:
            write_stream(client, job_id, stream, after=after, on_outage=on_outage)
        partial.replace(target)


def write_stream(
    client: Client, job_id: str, stream: BinaryIO, *, after: int = 0, on_outage: OnOutage | None = None
) -> None:
    """Write the results with a `seq` above `after`, one a line."""
    for line in client.results(job_id, after=after, on_outage=on_outage):
        stream.write(line + b"\n")
    stream.flush()


def follow_results(
    client: Client, job_id: str, stream: BinaryIO, *, after: int = 0, on_outage: OnOutage | None = None
) -> dict[str, Any]:
    """Write results as they come until the job has ended. Returns the job at its end."""
    for job in client.follow(job_id, interval=INTERVAL, on_outage=on_outage):
        # Read after the job was seen: what ended it is there.
        if job["last_seq"] > after:
            for line in client.results(job_id, after=after, on_outage=on_outage):
                stream.write(line + b"\n")
                after = json.loads(line)["seq"]
            stream.flush()
    return job


def last_seq(path: Path) -> int:
    """The `seq` of a file's last whole line, 0 where there is none. A line that was cut off is removed."""
    try:
        content = path.open("r+b")
    except FileNotFoundError:
        return 0
    with content:
        end = content.seek(0, os.SEEK_END)
        tail = b""
        start = end
        # Back to the beginning of the last whole line.
        while start > 0 and tail.rstrip(b"\n").count(b"\n") < 2:
            size = min(TAIL, start)
            start -= size
            content.seek(start)
            tail = content.read(size) + tail
        whole = tail[: tail.rfind(b"\n") + 1]
        content.truncate(end - (len(tail) - len(whole)))
    lines = whole.splitlines()
    try:
        return int(json.loads(lines[-1])["seq"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"{path} does not end with a result: it is left as it is.") from None


@contextlib.contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, gone at the end of the block unless it was moved."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb"):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error  # the caller knows the file by this name
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
