"""A job's results in a file: replaced whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cli.client import Client, OnOutage


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
