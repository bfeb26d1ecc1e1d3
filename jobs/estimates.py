"""When a job ends: what is open, by the rate of its last minutes with work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean, quantiles

FEWEST_LINES = 20
SHORTEST = 30.0  # seconds since the first claim
MINUTES = 10
HORIZON = 365 * 86400.0  # seconds; what takes longer has no date


@dataclass(frozen=True, slots=True)
class Estimate:
    """`at`, within `low` and `high`. `lines_per_second` is what it goes by, `basis` says so in words."""

    at: datetime
    low: datetime
    high: datetime
    lines_per_second: float
    basis: str


def percent(done: int, total: int, *, is_ended: bool) -> float:
    """Of 100, rounded down to one decimal. 100 only at the end."""
    if is_ended:
        return 100.0
    return min(done * 1000 // total, 999) / 10 if total else 0.0


def estimate(
    *,
    now: datetime,
    started_at: datetime,
    settled: int,
    left: int,
    minutes: Sequence[tuple[datetime, int]],
) -> Estimate | None:
    """None before `FEWEST_LINES` and `SHORTEST`, since a rate of a few lines says nothing.

    `minutes` are the newest ones with work, as `(beginning, lines)`, in any order; only whole ones count, so not the
    one of `started_at` nor that of `now`.
    """
    elapsed = (now - started_at).total_seconds()
    if left <= 0 or settled < FEWEST_LINES or elapsed < SHORTEST:
        return None
    whole = sorted(
        (minute, lines) for minute, lines in minutes if started_at <= minute <= now - timedelta(minutes=1) and lines > 0
    )[-MINUTES:]
    if not whole:
        rate = settled / elapsed
        basis = f"{_rate(rate)}, the mean since its first line was taken {elapsed:.0f} s ago"
        return _estimate(now, left, rate, rate, rate, basis)
    rates = [lines / 60 for _, lines in whole]
    rate = fmean(rates)
    slow, _, fast = quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else (rate, rate, rate)
    length = "minute" if len(whole) == 1 else f"{len(whole)} minutes"
    basis = f"{_rate(rate)}, the mean of the last {length} with work"
    return _estimate(now, left, rate, min(slow, rate), max(fast, rate), basis)


def _estimate(now: datetime, left: int, rate: float, slow: float, fast: float, basis: str) -> Estimate | None:
    if left / slow > HORIZON:
        return None
    at, low, high = (now + timedelta(seconds=left / each) for each in (rate, fast, slow))
    return Estimate(at, low, high, rate, basis)


def _rate(lines_per_second: float) -> str:
    return f"{lines_per_second:.3g} lines/s" if lines_per_second >= 1 else f"{lines_per_second * 60:.3g} lines/min"
