"""How many sequences an engine should have queued for the places that come free while more are claimed."""

from __future__ import annotations

import pytest

from worker.generation.turnover import AHEAD, WINDOW, Turnover


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("seconds", [0.5 * WINDOW, WINDOW, 5 * WINDOW])
def test_turnover_is_what_ends_in_a_second(clock: Clock, seconds: float) -> None:
    turnover = Turnover(clock)
    assert turnover.ahead == 0
    turnover.begin()
    for _ in range(round(seconds / 0.1)):
        clock.now += 0.1
        turnover.count(30)
    assert turnover.ahead == pytest.approx(300 * AHEAD, rel=0.02)


def test_turnover_forgets_what_ended_before_the_window(clock: Clock) -> None:
    turnover = Turnover(clock)
    clock.now += WINDOW
    turnover.count(500)
    clock.now += WINDOW - 0.1
    assert turnover.ahead == int(500 * AHEAD / WINDOW)
    clock.now += 0.2
    assert turnover.ahead == 0


def test_batch_that_ends_at_once_counts_by_its_share_of_the_window(clock: Clock) -> None:
    """A long job's requests, all of the same length, must not have a whole batch queued behind them for its time."""
    turnover = Turnover(clock)
    turnover.begin()
    clock.now += 6 * WINDOW
    turnover.count(256)
    assert turnover.ahead <= 256 / 4


def test_first_ends_after_a_rest_count_from_the_rest_on(clock: Clock) -> None:
    turnover = Turnover(clock)
    turnover.count(100)
    clock.now += 2 * AHEAD
    turnover.begin()
    clock.now += 0.1
    turnover.count(256)
    assert turnover.ahead == 256


def test_wait_for_a_claim_is_no_rest(clock: Clock) -> None:
    turnover = Turnover(clock)
    for _ in range(round(WINDOW / 0.1) - 1):
        clock.now += 0.1
        turnover.count(30)
        turnover.begin()
    assert turnover.ahead == pytest.approx(300 * AHEAD, rel=0.02)
