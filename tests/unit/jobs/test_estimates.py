"""Estimates go by whole minutes with work, and percents are rounded down."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from jobs.estimates import Estimate, estimate, percent

NOW = datetime(2026, 1, 2, 12, 30, 20, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
START = NOW - timedelta(hours=1)


def minutes_ago(count: int) -> datetime:
    return NOW.replace(second=0) - count * MINUTE


def found(
    *lines: int, left: int = 600, settled: int = 1000, started_at: datetime = START, skip: int = 1
) -> Estimate | None:
    """Of a job that settled `lines` in the minutes before this one, newest first."""
    minutes = [(minutes_ago(ago), count) for ago, count in enumerate(lines, skip)]
    return estimate(now=NOW, started_at=started_at, settled=settled, left=left, minutes=minutes)


def test_estimate_is_what_is_left_by_the_mean_of_its_minutes() -> None:
    estimated = found(120, 60, 60, 120, left=900)
    assert estimated is not None
    assert estimated.lines_per_second == 1.5
    assert estimated.at == NOW + timedelta(seconds=600)
    # The quartiles of 1, 1, 2, 2 lines/s.
    assert (estimated.low, estimated.high) == (NOW + timedelta(seconds=450), NOW + timedelta(seconds=900))
    assert estimated.basis == "1.5 lines/s, the mean of the last 4 minutes with work"


def test_estimate_goes_by_ten_minutes_at_most() -> None:
    estimated = found(*[60] * 10, 6000, 6000)
    assert estimated is not None
    assert estimated.lines_per_second == 1


def test_estimate_leaves_out_minutes_that_are_not_whole() -> None:
    # This minute, and the one in which the job's first line was taken.
    estimated = found(6000, 60, 6000, skip=0, started_at=minutes_ago(2) + timedelta(seconds=1))
    assert estimated is not None
    assert estimated.lines_per_second == 1


def test_estimate_goes_by_the_time_since_the_first_claim_where_no_minute_is_whole() -> None:
    estimated = found(40, skip=0, settled=40, left=80, started_at=NOW - timedelta(seconds=40))
    assert estimated is not None
    assert estimated.at == NOW + timedelta(seconds=80)
    assert estimated.basis == "1 lines/s, the mean since its first line was taken 40 s ago"


@pytest.mark.parametrize(
    ("settled", "seconds", "left"), [(19, 3600, 10), (1000, 29, 10), (1000, 3600, 0), (20, 30, 10**9)]
)
def test_estimate_is_none_where_little_is_known(settled: int, seconds: int, left: int) -> None:
    started_at = NOW - timedelta(seconds=seconds)
    assert estimate(now=NOW, started_at=started_at, settled=settled, left=left, minutes=[]) is None


@pytest.mark.parametrize(
    ("done", "total", "is_ended", "shown"),
    [
        (999_999, 1_000_000, False, 99.9),
        (1_000_000, 1_000_000, False, 99.9),
        (1_000_000, 1_000_000, True, 100.0),
        (1, 1_000_000, False, 0.0),
        (2, 3, False, 66.6),
        (0, 0, False, 0.0),
        (29, 100, False, 29.0),
    ],
)
def test_percent_is_rounded_down(done: int, total: int, is_ended: bool, shown: float) -> None:
    assert percent(done, total, is_ended=is_ended) == shown
