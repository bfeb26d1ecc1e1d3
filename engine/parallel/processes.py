"""The processes of all ranks but the first: started, told what to run, watched and ended by rank 0."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.device.collectives import ProcessGroup
from engine.parallel.messages import Message, Start

logger = logging.getLogger(__name__)

READY, CONNECTED = "ready", "connected"
"""What a rank says: that it has started, and that it has found the others. Anything else is why it ends."""

_GOODBYE = 0.5  # seconds for the last words of a rank that has ended


OnEnd = Callable[[int, int], None]
"""Of a rank's number and its process's exit code."""


class RankEnded(Exception):
    """A rank has ended, or cannot be reached; the message says which, and why."""


class RankProcesses:
    """Implements `OtherRanks`. One thread uses it; `close` may come from any."""

    def __init__(self, path: Path, config: EngineConfig, device: torch.device) -> None:
        """Start the processes for a model at `path`; they import torch by the time that `connect` waits for."""
        self._size = config.tensor_parallel_size
        self._device = device
        self._threads_before = torch.get_num_threads()
        self._group: ProcessGroup | None = None
        self._is_closing = False
        # A private directory: what stands in the file is where ranks listen.
        self._directory = Path(tempfile.mkdtemp(prefix="pagemill-ranks-"))
        threads = max(1, self._threads_before // self._size)
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self._ranks = [_Rank(number, self._on_end) for number in range(1, self._size)]
        for rank in self._ranks:
            rank.connection.send(
                Start(path, config, rank.number, self._rendezvous, threads, logging.getLogger().getEffectiveLevel())
            )

    @property
    def _rendezvous(self) -> Path:
        return self._directory / "store"

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def connect(self) -> ProcessGroup:
        """Wait for all ranks to start, and join them; raises `RankEnded`."""
        self._expect(READY)
        self._group = ProcessGroup(self._rendezvous, 0, self._size, self._device)
        self._expect(CONNECTED)
        shutil.rmtree(self._directory, ignore_errors=True)
        return self._group

    def send(self, message: Message) -> None:
        """See `OtherRanks.send`."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for rank in self._ranks:
            try:
                rank.connection.send_bytes(data)
            except OSError as error:
                raise RankEnded(rank.last_words()) from error

    def check(self) -> None:
        """See `OtherRanks.check`."""
        for rank in self._ranks:
            if rank.has_ended:
                raise RankEnded(rank.last_words())

    def close(self) -> None:
        """See `OtherRanks.close`."""
        self._is_closing = True
        for rank in self._ranks:
            rank.end()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._device.type == "cpu":
            torch.set_num_threads(self._threads_before)

    def _expect(self, word: str) -> None:
        for rank in self._ranks:
            try:
                said = rank.connection.recv()
            except (EOFError, OSError) as error:
                raise RankEnded(rank.last_words()) from error
            if said != word:
                raise RankEnded(f"rank {rank.number} ended: {said}")

    def _on_end(self, number: int, code: int) -> None:
        """On a thread of the rank that ended."""
        if self._is_closing:
            return
        logger.critical("rank %d ended (%s)", number, f"signal {-code}" if code < 0 else f"status {code}")
        if self._group is not None:
            self._group.abort()


class _Rank:
    """One process, and the thread that starts it and waits for its end.

    Linux sends a child its parent-death signal when the *thread* that started it ends. This one ends last.
    """

    def __init__(self, number: int, on_end: OnEnd) -> None:
        self.number = number
        self._reason: str | None = None
        self.connection, theirs = Pipe()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(theirs, started, on_end), name=f"rank {number}", daemon=True
        )
        self._thread.start()
        started.wait()

    def _run(self, theirs: Connection, started: threading.Event, on_end: OnEnd) -> None:
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine.parallel.rank", str(fd), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                start_new_session=True,  # so that a terminal's Ctrl-C does not reach it
            )
        started.set()
        on_end(self.number, self.process.wait())

    @property
    def has_ended(self) -> bool:
        # A closed connection is seen before the process has ended.
        return not self._thread.is_alive() or self._hung_up()

    def _hung_up(self) -> bool:
        """Whether it has said why it ends, or closed the connection: a rank that runs says nothing."""
        return self.connection.closed or self.connection.poll()

    def last_words(self) -> str:
        """Why it ended, as far as it could say."""
        if self._reason is None:
            with contextlib.suppress(EOFError, OSError):
                if self.connection.poll(_GOODBYE):
                    self._reason = self.connection.recv()
            self._thread.join(_GOODBYE)
        if self._reason is None:
            code = self.process.poll()
            self._reason = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return f"rank {self.number} ended: {self._reason}"

    def end(self) -> None:
        """Kill the process: it has nothing to save."""
        self.process.kill()
        self._thread.join()
        self.connection.close()
