"""What is kept of where a line's time went: the engine's phases, and what the worker itself took."""

from __future__ import annotations

from engine.outputs import RequestTiming
from jobs.line_timing import LineTiming


def line_timing(timing: RequestTiming, *, taken_at: float, ended: float) -> LineTiming:
    """The phases of a line that was taken up and ended at these times of `time.monotonic`; together they fill it.

    `engine` is the rest: tokenizing, queueing and reading its answer.
    """
    known = timing.grammar + timing.prefill + timing.decode + timing.preempted
    return LineTiming(
        engine=ended - taken_at - known,
        grammar=timing.grammar,
        prefill=timing.prefill,
        decode=timing.decode,
        preempted=timing.preempted,
        preemptions=timing.preemptions,
        ended=ended,
    )
