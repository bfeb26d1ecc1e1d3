"""What a Celery process does with a signal when something of it hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.processes import PATIENCE

HANGING = """
import threading

from celery import bootsteps

from jobs.settings import Settings
from worker.app import make_app, run_solo

never = threading.Lock()
never.acquire()

class Step(bootsteps.StartStopStep):
    def start(self, worker):
        print("started", flush=True)

    def stop(self, worker):
        {stop}

app = make_app(Settings(), "test")
app.steps["worker"].add(Step)
run_solo(app, queues=["test"], name="test", end_within={end_within})
{after}
"""


@pytest.mark.parametrize(
    ("stop", "after", "end_within"),
    [
        ("never.acquire()", "", 0.5),
        # Celery looks up from a Redis that is away within two seconds; the interpreter then waits for this thread.
        ("pass", "threading.Thread(target=never.acquire).start()", 2.5),
    ],
    ids=["a step", "the interpreter's end"],
)
def test_process_that_hangs_after_a_signal_logs_where_and_ends(stop: str, after: str, end_within: float) -> None:
    without_redis = os.environ | {"PAGEMILL_REDIS_URL": "redis://127.0.0.1:1/0"}
    with subprocess.Popen(
        [sys.executable, "-c", HANGING.format(stop=stop, after=after, end_within=end_within)],
        env=without_redis,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.terminate()
            _, log = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "Timeout" in log
    assert "most recent call first" in log
