"""Start `trial.py` as a process, ask it for verdicts, and end it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from engine.grammar.limits import GrammarLimits
from engine.grammar.trial import read_frame, write_frame
from engine.grammar.vocabulary import Vocabulary

_SCRIPT = Path(__file__).with_name("trial.py")

# Variables that the process gets: none that holds a secret.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")


class TrialFailed(Exception):
    """The process reached a limit, did not answer in time, or did not start; the message says which."""


class TrialProcess:
    """A trial process, started by the first `judge` and again by the one after it died. One thread calls `judge`."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self.patience = limits.patience
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # guards the process's start and end
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def judge(self, grammar: str, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return the verdict of `trial.try_grammar`; raises `TrialFailed`. The vocabulary must always be the same."""
        try:
            verdict: dict[str, Any] = self._ask(self._started(vocabulary), grammar)
        except (OSError, EOFError, ValueError) as error:
            raise TrialFailed(self._why(error)) from error
        return verdict

    def close(self) -> None:
        """End the process for good. Safe from any thread: a `judge` that is under way raises `TrialFailed`."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # flushing to an ended process fails
                stream.close()

    def _started(self, vocabulary: Vocabulary) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        with self._lock:
            if self._is_closed:
                raise OSError("it is closed")
            process = self._process = subprocess.Popen(
                # -P: imports must not find the script's neighbours.
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # so that a terminal's Ctrl-C does not reach it
            )
        tokens = [token.decode("latin-1") for token in vocabulary.wire_tokens()]
        self._ask(process, {"tokens": tokens, "limits": self._limits.for_trial()})
        return process

    def _ask(self, process: subprocess.Popen[bytes], document: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, document)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self.patience):
                raise OSError(f"no answer within {self.patience:g} s")
        return read_frame(process.stdout)

    def _why(self, error: Exception) -> str:
        process = self._process
        if process is None:
            return f"the process that tries it did not start: {error}"
        if not isinstance(error, EOFError | BrokenPipeError):
            self._end()
            return str(error)
        code = process.wait()
        self._end()
        if code == -signal.SIGPROF:
            return f"it takes more than {self._limits.seconds:g} s of processor time"
        if code == -signal.SIGABRT:  # Rust aborts when an allocation fails
            return f"it takes more than {self._limits.memory >> 20} MiB of memory"
        return f"it broke its process ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
