"""Threads that a worker cannot do without."""

from __future__ import annotations

import threading
from collections.abc import Callable

Crashed = Callable[[BaseException], None]
"""Told, on the thread that crashed, what nobody on it expected."""


class VitalThread(threading.Thread):
    """A daemon thread whose crash is told: a worker without it would look alive, and do nothing."""

    def __init__(self, name: str, work: Callable[[], None], crashed: Crashed) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._crashed = crashed

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this thread is gone
            self._crashed(error)
