"""The phases of a request follow each other: together they are its whole time, and each reading belongs to one."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import SamplingParams
from engine.outputs import RequestTiming
from engine.scheduling.request_clock import RequestClock
from tests.unit.engine.fake_engine import finish, make
from tests.unit.engine.fake_runner import FakeRunner


class Hands:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def phases(*moves: tuple[float, str]) -> RequestTiming:
    """The timing after these moves, each so many seconds after the one before."""
    hands = Hands()
    clock = RequestClock(hands)
    for seconds, move in moves:
        hands.now += seconds
        if move != "end":
            getattr(clock, move)()
    return clock.timing()


def test_each_second_belongs_to_one_phase() -> None:
    timing = phases((1, "compiled"), (2, "admitted"), (4, "sampled"), (8, "left"), (0, "end"))
    assert timing == RequestTiming(grammar=1, queue=2, prefill=4, decode=8)


def test_preempted_time_is_in_no_other_phase() -> None:
    timing = phases(
        (1, "admitted"), (2, "preempted"), (4, "admitted"), (8, "sampled"), (16, "preempted"), (32, "admitted"),
        (64, "left"), (0, "end"),
    )  # fmt: skip
    assert timing == RequestTiming(queue=1, prefill=2 + 8, decode=16 + 64, preempted=4 + 32, preemptions=2)


def test_request_that_ends_while_it_waits_has_no_other_phase() -> None:
    assert phases((3, "end")) == RequestTiming(queue=3)
    assert phases((1, "admitted"), (2, "preempted"), (4, "end")) == RequestTiming(
        queue=1, prefill=2, preempted=4, preemptions=1
    )


def test_time_of_one_completion_counts_while_another_is_preempted() -> None:
    timing = phases((1, "admitted"), (2, "admitted"), (4, "sampled"), (8, "preempted"), (16, "left"), (0, "end"))
    assert timing == RequestTiming(queue=1, prefill=2 + 4, decode=8 + 16, preemptions=1)


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(0, 12))
def test_phases_are_the_whole_time(gaps: list[int], first_token: int) -> None:
    moves = [(gap, "preempted" if place % 2 else "admitted") for place, gap in enumerate(gaps)]
    if gaps:
        # A token comes only of a request that is in the batch.
        moves.insert(1 + 2 * (first_token % ((len(gaps) + 1) // 2)), (7, "sampled"))
    timing = phases(*moves, (5, "end"))
    assert sum(astuple(timing)[:5]) == sum(gap for gap, _ in moves) + 5
    assert min(astuple(timing)) >= 0


@pytest.mark.parametrize("decode_steps", [1, 8])
def test_engine_says_where_a_request_was(decode_steps: int) -> None:
    engine = make(FakeRunner(num_blocks=8, block_size=4), decode_steps=decode_steps)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for number in range(4):
        engine.add(f"request-{number}", [number, 2, 3, 4], params)
    outputs = finish(engine).values()
    timings = [output.timing for output in outputs if output.timing is not None]
    assert len(timings) == 4
    assert all(timing.prefill > 0 and timing.decode > 0 for timing in timings)
    assert sum(timing.preemptions for timing in timings) == engine.stats().preemptions
    assert all((timing.preempted > 0) == (timing.preemptions > 0) for timing in timings)
