"""The thread that takes turns."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tests.support.processes import PATIENCE, await_condition
from worker.courier import periodic
from worker.courier.periodic import Periodic, is_away


@contextmanager
def running(turn: Callable[[threading.Event], None], interval: float) -> Iterator[Periodic]:
    timer = Periodic("test", turn, interval=interval)
    timer.start()
    try:
        yield timer
    finally:
        timer.stop()
        timer.join(PATIENCE)


def test_periodic_runs_at_once_and_every_interval() -> None:
    turns: list[float] = []
    with running(lambda stopping: turns.append(time.monotonic()), 0.02) as timer:
        await_condition(lambda: len(turns) >= 4, "four turns")
    assert not timer._thread.is_alive()


def test_wake_up_during_a_turn_causes_another() -> None:
    turns: list[int] = []
    in_turn, go_on = threading.Event(), threading.Event()

    def turn(stopping: threading.Event) -> None:
        turns.append(1)
        in_turn.set()
        go_on.wait(PATIENCE)

    with running(turn, 60) as timer:
        in_turn.wait(PATIENCE)
        timer.wake()
        go_on.set()
        await_condition(lambda: len(turns) == 2, "a second turn")


def test_failing_turn_is_logged_and_retried(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "FIRST_PAUSE", 0.01)
    turns: list[int] = []

    def turn(stopping: threading.Event) -> None:
        turns.append(1)
        if len(turns) == 1:
            raise RuntimeError("a bug")
        if len(turns) < 4:
            raise _error(OperationalError, psycopg.OperationalError("connection refused"))

    with caplog.at_level(logging.INFO), running(turn, 60):
        await_condition(lambda: "works again" in caplog.text, "recovery")
    levels = [(record.levelname, record.exc_info is not None) for record in caplog.records]
    assert levels == [("ERROR", True), ("WARNING", False), ("WARNING", False), ("INFO", False)]
    assert "Postgres is away, next try in 0.0 s: OperationalError: connection refused" in caplog.text


def test_pauses_grow_and_are_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(periodic, "LONGEST_PAUSE", 0.004)
    turns: list[float] = []

    def turn(stopping: threading.Event) -> None:
        turns.append(time.monotonic())
        raise RuntimeError

    with running(turn, 60):
        await_condition(lambda: len(turns) > 30, "thirty tries")


def test_connection_errors_mean_that_postgres_is_away() -> None:
    assert is_away(PoolTimeout())
    assert is_away(_error(OperationalError, psycopg.OperationalError("connection refused")))
    assert is_away(_error(OperationalError, psycopg.errors.AdminShutdown()))
    assert is_away(_error(OperationalError, psycopg.errors.CannotConnectNow()))
    assert is_away(_error(OperationalError, psycopg.errors.ConnectionFailure()))
    assert not is_away(_error(OperationalError, psycopg.errors.DeadlockDetected()))
    assert not is_away(_error(OperationalError, psycopg.errors.QueryCanceled()))
    assert not is_away(_error(ProgrammingError, psycopg.errors.UndefinedTable()))
    assert not is_away(RuntimeError())


def _error(kind: type[OperationalError] | type[ProgrammingError], cause: psycopg.Error) -> Exception:
    return kind("SELECT 1", None, cause)
