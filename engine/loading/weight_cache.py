"""A directory of packed weights, one file a model, that later starts map instead of packing again.

A file appears whole, by one rename, and is never changed; it may be deleted while processes have it mapped. Writers
take turns by a lock, in a thread of their own beside the first requests. Every failure leaves things as they would be
without a cache, and one line in the log.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import EngineConfig
from engine.loading.tensor_file import DamagedFile, map_tensors, write_tensors

logger = logging.getLogger(__name__)

LEAST_BYTES = 2**25
"""Of tensors that are kept: less is packed as fast as it is mapped."""

_LEFT_FREE = 2**30
"""Bytes of the disk that a new file leaves to others, databases among them."""

_EXIT_TIMEOUT = 10.0  # seconds that a process which ends lets its writer go on
_SUFFIX = ".weights"
_DRAFT = ".writing-"

_writers: list[threading.Thread] = []


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """What a model that was loaded and packed once consists of."""

    tensors: Mapping[str, Tensor]
    is_tied: bool
    """See `NativeDecoder.is_tied`: the checkpoint decides it, not its configuration alone."""


class WeightCache:
    """Files in one directory, that together take no more than `limit` bytes."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit

    @classmethod
    def of(cls, config: EngineConfig) -> WeightCache | None:
        """The cache that is configured; None where there is to be none, or the user has no home to put it in."""
        if not config.weight_cache_bytes:
            return None
        try:
            directory = config.weight_cache_dir or Path.home() / ".cache" / "pagemill" / "weights"
        except RuntimeError:
            return None
        return cls(directory, config.weight_cache_bytes)

    def open(self, name: str, identity: str) -> KeptWeights | None:
        """Map the weights of a model, by its name for people and the digest that it has; None where there are none.

        A damaged file is deleted.
        """
        path = self._path(name, identity)
        try:
            tensors, meta = map_tensors(path)
            if meta["identity"] != identity:
                raise DamagedFile("it holds another model")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedFile as damage:
            logger.warning("packed weights in %s are damaged and made anew: %s", path, damage)
            self.discard(name, identity)
            return None
        except OSError as error:
            logger.info("packed weights cannot be read: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # what was used last goes last
        logger.info("packed weights are mapped from %s", path)
        return KeptWeights(tensors, is_tied=meta["is_tied"])

    def discard(self, name: str, identity: str) -> None:
        """Delete a model's file, if it can be."""
        with contextlib.suppress(OSError):
            self._path(name, identity).unlink(missing_ok=True)

    def keep(self, name: str, identity: str, weights: KeptWeights, is_unchanged: Callable[[], bool]) -> None:
        """Begin to write the weights, unless they are small; `finish_writes` waits for the end.

        `is_unchanged` says, once they are to be written, whether they are still those that `identity` stands for.
        """
        if sum(tensor.nbytes for tensor in weights.tensors.values()) < LEAST_BYTES:
            return
        arguments = self._path(name, identity), identity, weights, is_unchanged
        writer = threading.Thread(target=self._keep, args=arguments, name="weight-cache", daemon=True)
        _writers.append(writer)
        writer.start()

    def _path(self, name: str, identity: str) -> Path:
        return self._directory / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:64]}-{identity[:16]}{_SUFFIX}"

    def _keep(self, path: Path, identity: str, weights: KeptWeights, is_unchanged: Callable[[], bool]) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._directory / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists() and is_unchanged():
                    self._write(path, identity, weights)
        except OSError as error:
            logger.info("packed weights are not kept for the next start: %s", error)

    def _write(self, path: Path, identity: str, weights: KeptWeights) -> None:
        """Called under the lock."""
        size = sum(tensor.nbytes for tensor in weights.tensors.values())
        for left_behind in self._directory.glob(f"{_DRAFT}*"):
            left_behind.unlink()
        self._make_room(size)
        draft = self._directory / f"{_DRAFT}{os.getpid()}"
        try:
            write_tensors(draft, weights.tensors, {"identity": identity, "is_tied": weights.is_tied})
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
        logger.info("packed weights (%.1f GB) are kept in %s", size / 1e9, path)

    def _make_room(self, size: int) -> None:
        """Delete what was unused for longest; raises `OSError` where that is not enough."""
        files = [(path.stat(), path) for path in self._directory.glob(f"*{_SUFFIX}")]
        total = sum(state.st_size for state, _ in files)
        if size > self._limit:
            raise OSError(errno.EFBIG, f"{size} bytes are more than the {self._limit} that all of them may take")
        for state, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total + size <= self._limit:
                break
            path.unlink()
            total -= state.st_size
        if shutil.disk_usage(self._directory).free < size + _LEFT_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))


def finish_writes(timeout: float | None = None) -> None:
    """Wait for files that this process is writing, for `timeout` seconds each."""
    while _writers:
        _writers.pop().join(timeout)


atexit.register(finish_writes, _EXIT_TIMEOUT)
