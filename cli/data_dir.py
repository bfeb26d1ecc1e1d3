"""The data directory: what `pagemill up` keeps between two runs, and who may use it now.

postgres/   the embedded Postgres: its cluster and its password
valkey/     the embedded Valkey's port and password
logs/       a file for each process
up.lock     locked by the `up` that runs here
child.lock  locked as long as any of its processes lives: they inherit the open file
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

CHILDREN_TIMEOUT = 60.0  # seconds; more than any child's grace
POLL_INTERVAL = 0.05  # seconds; flock(2) has no timeout of its own


class DataDirError(RuntimeError):
    """The data directory cannot be used. The message says why, and how to mend it."""


class DataDir:
    """Paths under one data directory, made private to this user."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def valkey(self) -> Path:
        return self.path / "valkey"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @contextlib.contextmanager
    def hold(self) -> Iterator[int]:
        """Make the directory and keep everyone else out of it. Yields a file descriptor that children are to inherit.

        The kernel frees both locks when their last holder ends, however it ends. Hence nothing is ever stale, and
        no recorded pid has to be trusted to mean the same process still.

        Raises DataDirError if another `up` runs here, or cannot be written to.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            ours = self._open("up.lock")
        except OSError as error:
            raise DataDirError(
                f"The data directory {self.path} cannot be used: {error.strerror}. "
                "Choose another with --data-dir or PAGEMILL_DATA_DIR."
            ) from error
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ours)
            if not _try_lock(ours):
                raise DataDirError(
                    f"Pagemill already runs on {self.path} (process {_written_pid(ours)}). "
                    "Stop it, or choose another directory with --data-dir."
                )
            os.ftruncate(ours, 0)
            os.pwrite(ours, f"{os.getpid()}\n".encode(), 0)
            children = self._open("child.lock")
            stack.callback(os.close, children)
            self._await_children(children)
            yield children

    def holder(self) -> str | None:
        """The process id of the `up` that runs here now; None where none does."""
        try:
            lock = os.open(self.path / "up.lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return None if _try_lock(lock) else _written_pid(lock)
        finally:
            os.close(lock)

    def _open(self, name: str) -> int:
        return os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _await_children(self, lock: int) -> None:
        # After a kill -9 of `up`, its Postgres may still be writing its last checkpoint.
        deadline = time.monotonic() + CHILDREN_TIMEOUT
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise DataDirError(
                    f"Processes of an earlier run still hold {self.path / 'child.lock'}. "
                    f"List them with: fuser -v '{self.path / 'child.lock'}', and end them."
                )
            time.sleep(POLL_INTERVAL)


def _written_pid(lock: int) -> str:
    return os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
