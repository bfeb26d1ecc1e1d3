"""How many sequences an engine should have queued for the places that come free while more are claimed."""

from __future__ import annotations

from worker.generation.turnover import AHEAD, WINDOW, Turnover


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_turnover_is_what_ends_in_a_second_of_the_window() -> None:
    clock = Clock()
    turnover = Turnover(clock)
    assert turnover.ahead == 0
    for _ in range(100):
        turnover.count(30)
        clock.now += WINDOW / 101
    assert turnover.ahead == int(100 * 30 * AHEAD / WINDOW)


def test_turnover_forgets_what_ended_before_the_window() -> None:
    clock = Clock()
    turnover = Turnover(clock)
    turnover.count(500)
    clock.now += WINDOW - 0.1
    assert turnover.ahead == int(500 * AHEAD / WINDOW)
    clock.now += 0.2
    assert turnover.ahead == 0


def test_batch_that_ends_at_once_counts_by_its_share_of_the_window() -> None:
    """A long job's requests, all of the same length, must not have a whole batch queued behind them for its time."""
    clock = Clock()
    turnover = Turnover(clock)
    clock.now += 6 * WINDOW
    turnover.count(256)
    assert turnover.ahead <= 256 / 4
