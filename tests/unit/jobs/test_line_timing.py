"""How a result's row keeps where its line's time went."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs.line_timing import LineTiming, StoredTiming

MILLISECONDS = st.integers(0, 2**40)


@given(st.tuples(*[MILLISECONDS] * 6), st.integers(0, 2**20))
def test_stored_timing_is_read_as_it_was_written(phases: tuple[int, ...], preemptions: int) -> None:
    *until_its_end, write = (number / 1000 for number in phases)
    stored = LineTiming(*until_its_end, preemptions, ended=0.0).stored(write)
    assert StoredTiming.read(stored) == StoredTiming(*phases, preemptions)


def test_usual_timing_takes_few_bytes() -> None:
    assert len(LineTiming(0.11, 0, 0.13, 9.79, 0, 0, ended=100.0).stored(100.17)) == 11


def test_timing_of_no_or_of_another_version_is_none() -> None:
    assert StoredTiming.read(None) is None
    assert StoredTiming.read(b"\x02\x00") is None


def test_clock_that_jumps_makes_no_negative_number() -> None:
    assert StoredTiming.read(LineTiming(-0.5, 0, 0, 0, 0, 0, ended=100.0).stored(90.0)) == StoredTiming(*[0] * 7)
