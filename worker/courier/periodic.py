"""A thread that does one thing again and again, and rests while Postgres is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeGuard

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from jobs.database import brief

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds; doubles with each failure in a row
LONGEST_PAUSE = 10.0
# Of SQLSTATE: connection exceptions, operator intervention (shutting down, starting up, terminated).
_AWAY = ("08", "57P")


class Periodic:
    """Calls `turn` every `interval` seconds, and at once when woken.

    A turn that fails is logged and tried again later, each time a little later while the failures go on; it never ends
    the thread. Each turn ends with `on_turn` or `on_failure`. `turn` looks at `stopping` between its transactions.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[threading.Event], None],
        *,
        interval: float,
        on_turn: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._turn = turn
        self._interval = interval
        self._on_turn = on_turn
        self._on_failure = on_failure
        self._works = False
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def works(self) -> bool:
        """Whether the last turn went well; False before the first one ended."""
        return self._works

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Take the next turn now."""
        self._wake.set()

    def stop(self) -> None:
        """Take no other turn. Returns at once; `join` waits for the one under way."""
        self._stopping.set()
        self._wake.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._turn(self._stopping)
            except Exception as error:
                failures += 1
                self._works = False
                self._on_failure()
                pause = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 16), LONGEST_PAUSE)
                if is_away(error):
                    logger.warning("%s: Postgres is away, next try in %.1f s: %s", self._name, pause, brief(error))
                else:
                    logger.exception("%s failed, next try in %.1f s", self._name, pause)
                self._stopping.wait(pause)  # a wake-up does not make Postgres come back
            else:
                if failures:
                    logger.info("%s: works again", self._name)
                failures = 0
                self._works = True
                self._on_turn()
                self._wake.wait(self._interval)


def is_away(error: BaseException) -> TypeGuard[SQLAlchemyError]:
    """Whether this says that Postgres cannot be reached now, rather than that it refused a statement."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    sqlstate: str | None = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or sqlstate is None or sqlstate.startswith(_AWAY)
