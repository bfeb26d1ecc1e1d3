"""What the processes of a service use while a benchmark goes through its phases: memory sampled, CPU counted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bench.usage import cpu_seconds, family, proportional_memory

INTERVAL = 1.0  # seconds between two samples


@dataclass(slots=True)
class PhaseUsage:
    """One phase, in seconds; by process its CPU in seconds, and its memory in bytes: at most, and at the end."""

    seconds: float = 0.0
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    end_bytes: dict[str, int] = field(default_factory=dict)


class ProcessSamples:
    """Samples each named process with its descendants, from a thread, while it is open as a context."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._phase: PhaseUsage | None = None
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    def __enter__(self) -> ProcessSamples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @contextlib.contextmanager
    def phase(self) -> Iterator[PhaseUsage]:
        """Fill a `PhaseUsage` while the block runs."""
        usage = PhaseUsage()
        self._sample(usage)
        before, began = self._cpu(), time.perf_counter()
        with self._lock:
            self._phase = usage
        try:
            yield usage
        finally:
            with self._lock:
                self._phase = None
            usage.seconds = time.perf_counter() - began
            usage.cpu_seconds = {name: seconds - before[name] for name, seconds in self._cpu().items()}
            self._sample(usage)

    def _run(self) -> None:
        while not self._is_over.wait(INTERVAL):
            with self._lock:
                if self._phase is not None:
                    self._sample(self._phase)

    def _sample(self, usage: PhaseUsage) -> None:
        for name, pid in self._pids.items():
            size = proportional_memory(family(pid))
            usage.end_bytes[name] = size
            usage.peak_bytes[name] = max(size, usage.peak_bytes.get(name, 0))

    def _cpu(self) -> dict[str, float]:
        return {name: sum(map(cpu_seconds, family(pid))) for name, pid in self._pids.items()}
