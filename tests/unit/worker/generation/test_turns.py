"""When a worker of several models leaves one for another, by a clock of the test's own."""

from __future__ import annotations

import pytest

from jobs.queries.demand import Demand
from worker.generation.turns import COST_FACTOR, LIVE_SWITCH_AFTER, Turns

SWITCH_AFTER = 60.0


class Clock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def costs() -> dict[str, float]:
    return {"a": 2.0, "b": 2.0, "c": 2.0}


@pytest.fixture
def turns(clock: Clock, costs: dict[str, float]) -> Turns:
    return Turns("abc", switch_after=SWITCH_AFTER, cost=costs.__getitem__, clock=clock)


def waits(seconds: float, *, live: float | None = None, is_served: bool = False) -> Demand:
    return Demand(seconds, live, is_served)


def test_present_model_goes_on_while_lines_wait_for_it(turns: Turns, clock: Clock) -> None:
    clock.now += SWITCH_AFTER
    assert turns.following("a", {"a": waits(5), "b": waits(SWITCH_AFTER)}) is None
    assert turns.following("a", {"a": waits(5)}) is None


def test_worker_without_any_demand_stays(turns: Turns) -> None:
    assert turns.following("a", {}) is None


def test_idle_worker_turns_at_once_to_the_model_that_waits_longest(turns: Turns, clock: Clock) -> None:
    clock.now += 10
    assert turns.following("a", {"b": waits(0.01), "c": waits(0.02)}) == "c"


def test_idle_worker_turns_first_to_callers_who_wait(turns: Turns, clock: Clock) -> None:
    clock.now += 10
    assert turns.following("a", {"b": waits(0.01, live=0.01), "c": waits(9)}) == "b"


def test_idle_worker_leaves_a_model_to_another_worker_for_as_long_as_a_switch_takes(turns: Turns, clock: Clock) -> None:
    clock.now += 10
    assert turns.following("a", {"b": waits(2.0, is_served=True)}) is None
    assert turns.following("a", {"b": waits(2.1, is_served=True)}) == "b"


def test_no_model_starves_while_lines_of_the_present_one_never_end(turns: Turns, clock: Clock) -> None:
    clock.now += SWITCH_AFTER + 0.1
    assert turns.following("a", {"a": waits(900), "b": waits(SWITCH_AFTER)}) is None
    assert turns.following("a", {"a": waits(900), "b": waits(SWITCH_AFTER + 0.05)}) == "b"
    # Another worker runs it: its lines wait for want of speed.
    assert turns.following("a", {"a": waits(900), "b": waits(900, is_served=True)}) is None


def test_long_queues_take_turns_in_a_circle_each_as_long_as_the_bound(turns: Turns, clock: Clock) -> None:
    # Lines of all three are hours old, those of one always the oldest.
    queues = {"a": waits(72_000), "b": waits(71_000), "c": waits(36_000)}
    present, began, seen = "a", clock.now, []
    for _ in range(20 * int(SWITCH_AFTER)):
        clock.now += 1
        following = turns.following(present, queues)
        if following is not None:
            seen.append((present, clock.now - began))
            turns.end_turn(present)
            present, began = following, clock.now
    assert {length for _, length in seen} == {SWITCH_AFTER + 1}
    assert "".join(model for model, _ in seen) == ("abc" * 7)[: len(seen)]
    assert len(seen) >= 15


def test_bound_is_ten_times_the_cost_of_a_dear_switch(turns: Turns, clock: Clock, costs: dict[str, float]) -> None:
    costs["b"] = 30.0
    clock.now += 10_000
    assert turns.following("a", {"a": waits(1), "b": waits(COST_FACTOR * 30)}) is None
    assert turns.following("a", {"a": waits(1), "b": waits(COST_FACTOR * 30 + 1)}) == "b"


@pytest.mark.parametrize(("cost", "bound"), [(0.0, LIVE_SWITCH_AFTER), (2.0, COST_FACTOR * 2.0)])
def test_callers_who_wait_are_held_up_by_the_cost_alone(
    turns: Turns, clock: Clock, costs: dict[str, float], cost: float, bound: float
) -> None:
    costs["b"] = cost
    clock.now += 10_000
    assert turns.following("a", {"a": waits(900), "b": waits(bound, live=bound)}) is None
    assert turns.following("a", {"a": waits(900), "b": waits(bound + 0.1, live=bound + 0.1)}) == "b"
