"""Threads that a worker cannot do without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

OnCrash = Callable[[BaseException], None]
"""Called, on the thread that crashed, with the error that ended it."""


class VitalThread(threading.Thread):
    """A daemon thread whose crash ends the worker, which would look alive without it and do nothing."""

    def __init__(self, name: str, work: Callable[[], None], on_crash: OnCrash) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._working_since: float | None = None  # monotonic
        self._on_crash = on_crash

    def note_progress(self) -> None:
        """Say that a piece of work begins, all of which have to end within the watchdog's limit."""
        self._working_since = time.monotonic()

    def note_waiting(self) -> None:
        """Say that the thread waits for something to do, for as long as it likes."""
        self._working_since = None

    def stalled_for(self) -> float:
        """Seconds since the piece of work under way began; 0 while it waits."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - of any kind: this thread ends here
            self._on_crash(error)
