"""Threads that a worker cannot do without."""

from __future__ import annotations

import threading
from collections.abc import Callable

OnCrash = Callable[[BaseException], None]
"""Called, on the thread that crashed, with the error that ended it."""


class VitalThread(threading.Thread):
    """A daemon thread whose crash ends the worker, which would look alive without it and do nothing."""

    def __init__(self, name: str, work: Callable[[], None], on_crash: OnCrash) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_crash = on_crash

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - of any kind: this thread ends here
            self._on_crash(error)
