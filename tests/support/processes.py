"""Watch processes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

# Seconds. No test that passes waits so long: it tells "slow" from "never" on a machine that others load.
PATIENCE = 90.0


def await_condition(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Fail the test unless `condition` comes true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.02)


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes and everything that descends from them."""
    found = []
    for pid in pids:
        process = psutil.Process(pid)
        found += [process, *process.children(recursive=True)]
    return found


def await_gone(processes: Iterable[psutil.Process], timeout: float = PATIENCE) -> None:
    """Fail the test unless all these processes end in time. A zombie has ended: its parent has yet to look."""

    def alive() -> list[psutil.Process]:
        return [process for process in processes if _is_alive(process)]

    await_condition(lambda: not alive(), f"end of {alive()}", timeout)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
