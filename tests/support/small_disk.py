"""A file system of a few MiB, for the servers of one process tree alone, that a test can fill and empty again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MIB = 1 << 20
_MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True)
class SmallDisk:
    """Embedded services whose data directory is a disk of its own."""

    database_url: str
    redis_url: str
    _inside: Path  # the disk, as it is seen from outside of its namespace

    def fill(self) -> None:
        """Leave not a byte."""
        with (self._inside / "filler").open("wb", buffering=0) as filler:
            for size in (MIB, 4096, 1):
                with contextlib.suppress(_Full):
                    while True:
                        _write(filler.fileno(), bytes(size))

    def empty(self) -> None:
        """Take the filler away."""
        (self._inside / "filler").unlink()


class _Full(Exception):
    pass


def _write(descriptor: int, data: bytes) -> None:
    try:
        if os.write(descriptor, data) < len(data):
            raise _Full
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _Full from error
        raise


@contextlib.contextmanager
def services_on_a_small_disk(directory: Path, *, size: int) -> Iterator[SmallDisk]:
    """Postgres and Valkey on a disk of `size` bytes. Skips the test where none can be mounted."""
    mounted = directory / "disk"
    mounted.mkdir()
    command = [
        *_namespace(mounted),
        str(size),
        str(mounted),
        sys.executable,
        "-m",
        "tests.support.embedded_host",
        str(mounted),
    ]
    with (directory / "host.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (directory / "host.log").read_text()
        ready = json.loads(line)
        inside = Path(f"/proc/{process.pid}/root") / mounted.relative_to("/")
        yield SmallDisk(ready["database_url"], ready["redis_url"], inside)
    finally:
        process.terminate()
        process.communicate()


def _namespace(directory: Path) -> list[str]:
    """The command line that mounts a disk on `directory` in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    for options in ([], ["--user", "--map-root-user"]):
        prefix = [unshare or "unshare", *options, "--mount", "sh", "-c", _MOUNT, "sh"]
        if unshare and subprocess.run([*prefix, str(MIB), str(directory), "true"], capture_output=True).returncode == 0:
            return prefix
    pytest.skip("no file system can be mounted here")
