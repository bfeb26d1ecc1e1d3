"""The harness' side of a contender's process: start it, give it orders, let it wait for its turn, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from bench.contender import Contender
from bench.environments import python_of
from bench.usage import family, peak_memory

ROOT = Path(__file__).parent.parent
END_TIMEOUT = 60.0  # seconds to end by itself

# Each library shall take as many threads as it is told, in its own way.
_UNWANTED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "LD_PRELOAD")


def clean_environment() -> dict[str, str]:
    """Our environment variables without those that change how libraries compute; with a hub that is not asked."""
    environment = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    return environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class ContenderFailed(RuntimeError):
    """It answered with an error, ended, or took too long. The message says what it was."""


class ContenderProcess:
    """One contender's process, with one model in one precision."""

    def __init__(self, contender: Contender, cache: Path, log: Path, threads: int) -> None:
        """Start the process; raises `NotInstallable` where its environment cannot be made."""
        environment = clean_environment()
        if contender.environment is None:
            command, directory = [sys.executable], ROOT
        else:
            python, directory = python_of(contender.environment, cache), cache
            command = [str(python), "-P"]  # finds nothing in the working directory
            environment |= contender.variables(python.parent.parent, threads)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, "-m", "bench.process", contender.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
                env=environment,
            )
        self._answers = b""

    def ask(self, order: Mapping[str, object], timeout: float) -> dict[str, Any]:
        """The answer to an order; raises `ContenderFailed`, and then the process is of no more use."""
        try:
            _pipe(self._process.stdin).write(json.dumps(order).encode() + b"\n")
            _pipe(self._process.stdin).flush()
            answer: dict[str, Any] = json.loads(self._line(timeout))
        except (OSError, EOFError):
            raise ContenderFailed(f"it ended: see {self._log}") from None
        if "error" in answer:
            raise ContenderFailed(answer["error"])
        return answer

    def peak_memory(self) -> int:
        """Bytes that it has used at most since it started."""
        counted = self.ask({"processes": None}, END_TIMEOUT)["processes"]
        return peak_memory(family(self._process.pid) if counted is None else counted)

    def pause(self) -> None:
        """Let it use no CPU until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and all that it started."""
        self.resume()
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        _pipe(self._process.stdout).close()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            for pid in family(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _line(self, timeout: float) -> bytes:
        pipe, deadline = _pipe(self._process.stdout), time.monotonic() + timeout
        while b"\n" not in self._answers:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.kill()
                raise ContenderFailed(f"it took longer than {timeout:g} s")
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                raise EOFError
            self._answers += part
        line, _, self._answers = self._answers.partition(b"\n")
        return line


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
